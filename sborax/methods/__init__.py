"""The methods, one file a paper."""

from sborax.methods.bat import Bat
from sborax.methods.bone import Bone
from sborax.methods.dora import DoRA
from sborax.methods.lora import LoRA
from sborax.methods.mo_sara import MoSARA
from sborax.methods.olora import OLoRA
from sborax.methods.pissa import PiSSA
from sborax.methods.sara import SARA
from sborax.methods.sbora import SBoRA

__all__ = ["Bat", "Bone", "DoRA", "LoRA", "MoSARA", "OLoRA", "PiSSA", "SARA", "SBoRA"]
