"""The methods, one file a paper."""

from sborax.methods.adalora import AdaLoRA
from sborax.methods.bat import Bat
from sborax.methods.bone import Bone
from sborax.methods.c3a import C3A
from sborax.methods.delora import DeLoRA
from sborax.methods.dora import DoRA
from sborax.methods.hira import HiRA
from sborax.methods.hra import HRA
from sborax.methods.ia3 import IA3
from sborax.methods.loha import LoHa
from sborax.methods.lokr import LoKr
from sborax.methods.lora import LoRA
from sborax.methods.lora_ga import LoRAGA
from sborax.methods.milora import MiLoRA
from sborax.methods.mo_sara import MoSARA
from sborax.methods.oft import OFT
from sborax.methods.olora import OLoRA
from sborax.methods.orthogonal import OrthogonalAdaptation
from sborax.methods.pissa import PiSSA
from sborax.methods.prilora import PRILoRA
from sborax.methods.randlora import RandLoRA
from sborax.methods.reslora import ResLoRA
from sborax.methods.sara import SARA
from sborax.methods.sbora import SBoRA
from sborax.methods.shira import SHiRA
from sborax.methods.vera import VeRA

__all__ = [
    "AdaLoRA",
    "Bat",
    "Bone",
    "C3A",
    "DeLoRA",
    "DoRA",
    "HRA",
    "HiRA",
    "IA3",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAGA",
    "MiLoRA",
    "MoSARA",
    "OFT",
    "OLoRA",
    "OrthogonalAdaptation",
    "PRILoRA",
    "PiSSA",
    "RandLoRA",
    "ResLoRA",
    "SARA",
    "SBoRA",
    "SHiRA",
    "VeRA",
]
