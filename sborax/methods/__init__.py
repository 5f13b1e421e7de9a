"""The methods, one file a paper.

A line here makes a class public: `sborax.LoRA`, a name in rules and commands, and a section of the documentation.
"""

from sborax.methods.adalora import AdaLoRA as AdaLoRA
from sborax.methods.adamss import AdaMSS as AdaMSS
from sborax.methods.bat import Bat as Bat
from sborax.methods.bdlora import BDLoRA as BDLoRA
from sborax.methods.boft import BOFT as BOFT
from sborax.methods.bone import Bone as Bone
from sborax.methods.c3a import C3A as C3A
from sborax.methods.corda import CorDA as CorDA
from sborax.methods.deft import DEFT as DEFT
from sborax.methods.delora import DeLoRA as DeLoRA
from sborax.methods.dora import DoRA as DoRA
from sborax.methods.eva import EVA as EVA
from sborax.methods.fourier_ft import FourierFT as FourierFT
from sborax.methods.frod import FRoD as FRoD
from sborax.methods.glora import GLoRA as GLoRA
from sborax.methods.gralora import GraLoRA as GraLoRA
from sborax.methods.hira import HiRA as HiRA
from sborax.methods.hra import HRA as HRA
from sborax.methods.ia3 import IA3 as IA3
from sborax.methods.kasa import KaSA as KaSA
from sborax.methods.lily import Lily as Lily
from sborax.methods.loftq import LoftQ as LoftQ
from sborax.methods.loha import LoHa as LoHa
from sborax.methods.lokr import LoKr as LoKr
from sborax.methods.lora import LoRA as LoRA
from sborax.methods.lora_ga import LoRAGA as LoRAGA
from sborax.methods.mica import MiCA as MiCA
from sborax.methods.milora import MiLoRA as MiLoRA
from sborax.methods.mo_sara import MoSARA as MoSARA
from sborax.methods.monteclora import MonteCLoRA as MonteCLoRA
from sborax.methods.oft import OFT as OFT
from sborax.methods.olora import OLoRA as OLoRA
from sborax.methods.orthogonal import OrthogonalAdaptation as OrthogonalAdaptation
from sborax.methods.osf import OSF as OSF
from sborax.methods.peanut import PEANuT as PEANuT
from sborax.methods.pissa import PiSSA as PiSSA
from sborax.methods.prilora import PRILoRA as PRILoRA
from sborax.methods.psoft import PSOFT as PSOFT
from sborax.methods.pvera import PVeRA as PVeRA
from sborax.methods.qalora import QALoRA as QALoRA
from sborax.methods.randlora import RandLoRA as RandLoRA
from sborax.methods.reslora import ResLoRA as ResLoRA
from sborax.methods.road import RoAd as RoAd
from sborax.methods.sara import SARA as SARA
from sborax.methods.sbora import SBoRA as SBoRA
from sborax.methods.shira import SHiRA as SHiRA
from sborax.methods.super_tuning import SuperTuning as SuperTuning
from sborax.methods.tiny_lora import TinyLoRA as TinyLoRA
from sborax.methods.uni_lora import UniLoRA as UniLoRA
from sborax.methods.vb_lora import VBLoRA as VBLoRA
from sborax.methods.velora import VeLoRA as VeLoRA
from sborax.methods.vera import VeRA as VeRA
from sborax.methods.wave_ft import WaveFT as WaveFT

# pyright goes by the aliases above; it cannot read this list.
__all__ = sorted(name for name, item in globals().items() if isinstance(item, type))  # pyright: ignore
