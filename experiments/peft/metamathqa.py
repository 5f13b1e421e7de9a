# SBORAX_DATA=data sborax train experiments/peft/metamathqa.py --out runs/peft_metamathqa
"""PEFT's own comparison: GSM8K after MetaMathQA, LLaMA-3.2-3B (github.com/huggingface/peft, method_comparison).

Every method with the same model, data, order, batches and schedule: 5,000 steps of 4 samples, loss on question and
answer. `experiment()` is its LoRA of rank 32. The numbers are all results that are stored at commit 5d602fdb, of runs
between 2026-07-14 and 2026-08-11 on an NVIDIA L40S.
"""

import json

import sborax as sx
from sborax.adapters.core import AbstractMethod
from sborax.cli.recipes import Row, by_task, method_change

TWO = r"self_attn/(q|v)_proj"
LR = "1e-4"
SCORED = "peft_gsm8k"


def experiment() -> sx.Experiment:
    """LoRA of rank 32 on q and v of LLaMA-3.2-3B."""
    return sx.Experiment(
        model="meta-llama/Llama-3.2-3B",
        data=sx.Data(
            "meta-math/MetaMathQA",
            template="Question: {query} Think step by step.\nAnswer:",
            answer="{response}",
            loss_on="all",
            max_length=768,
            limit=20_000,
        ),
        rules=((TWO, sx.LoRA(rank=32, alpha=64.0)),),
        optimizer=sx.Optimizer(lr=float(LR), schedule="cosine", warmup=0.1, decay=0.1, clip=1.0),
        steps=5_000,
        batch_size=4,
        precision="bfloat16",
    )


def _alone(method: AbstractMethod) -> tuple[str, ...]:
    return (method_change(method),)


def _ia3(outputs: str, inputs: str) -> tuple[str, ...]:
    return (f"rules={json.dumps([[outputs, {'type': 'IA3'}], [inputs, {'type': 'IA3', 'side': 'in'}]])}",)


BUDGET = {"type": "AdaLoRABudget", "target": 32, "warmup": 200, "cooldown": 500}
HOW = {
    "hira / rank32-lr4.5e-3": _alone(sx.HiRA(rank=32)),
    "lora / rank64-rslora": _alone(sx.LoRA(rank=64, alpha=64.0, rslora=True)),
    "shira / lr_0.0003-random_seed_42": _alone(sx.SHiRA(rank=32)),
    "miss / bat": _alone(sx.Bat(rank=64)),
    "gralora / rank32": _alone(sx.GraLoRA(rank=32)),
    "lora / rank10-target-mlp": ("rules.0.pattern=mlp", *_alone(sx.LoRA(rank=10, alpha=20.0))),
    "oft / rank32": _alone(sx.OFT(block=96)),
    "c3a / default": _alone(sx.C3A(block=64)),
    "miss / default": _alone(sx.Bone(rank=64)),
    "lora / rank32": (),
    "randlora / default": _alone(sx.RandLoRA(rank=32)),
    "lora / rank64": _alone(sx.LoRA(rank=64, alpha=128.0)),
    "full-finetuning / lr_0.00001": ("rules=[]", "train_base=true"),
    "lora / rank32-dora": _alone(sx.DoRA(rank=32, alpha=64.0)),
    "delora / rank32": _alone(sx.DeLoRA(rank=32, strength=15.0)),
    "lokr / rank32-factor4-lr0.003": _alone(sx.LoKr(rank=32, alpha=64.0, factor=4)),
    "ia3 / all-attn-5k-lr0.005": _ia3("self_attn", "mlp"),
    "lora / rank32-lorafa": ("optimizer.name=lora_fa",),
    "waveft / n_frequency-5000": _alone(sx.WaveFT(coefficients=5000)),
    "ia3 / lr_0.001": _ia3("self_attn/(k|v)_proj", "down_proj"),
    "loha / rank32": _alone(sx.LoHa(rank=32, alpha=64.0)),
    "miss / mini": _alone(sx.Bone(rank=64, mini_rank=64)),
    "adalora / rank32": (*_alone(sx.AdaLoRA(rank=64, alpha=8.0)), f"procedure={json.dumps(BUDGET)}"),
    "vera / default": _alone(sx.VeRA(rank=256)),
    "pvera / rank64": _alone(sx.PVeRA(rank=64)),
    "pvera / default": _alone(sx.PVeRA(rank=256)),
    "tinylora / default": _alone(sx.TinyLoRA()),
    "psoft / fast": _alone(sx.PSOFT(rank=256, terms=5)),
    "psoft / default": _alone(sx.PSOFT(rank=256)),
    "glora / default": _alone(sx.GLoRA(rank=8)),
    "glora / vector-paths": _alone(sx.GLoRA(weight="vector")),
    "frod / default": _alone(sx.FRoD()),
    "frod / sparse0.02-lr_0.001": _alone(sx.FRoD(density=0.02)),
    "peanut / rank32-relu-depth0-s2.0": _alone(sx.PEANuT(rank=32, alpha=2.0)),
    "peanut / rank1-relu-depth0-s32.0": _alone(sx.PEANuT(rank=1, alpha=32.0)),
    "ia3 / default": _ia3("self_attn/(k|v)_proj", "down_proj"),
    "road / lr_0.001": _alone(sx.RoAd(variant="2")),
    "fourierft / n_frequency-5000": _alone(sx.FourierFT(coefficients=5000, alpha=300.0)),
    "fourierft / default": _alone(sx.FourierFT(alpha=300.0)),
}
"""How sborax runs what it has: method / experiment, as PEFT's folders are called."""
SOURCE = "results in method_comparison/MetaMathQA of github.com/huggingface/peft, commit 5d602fdb"
COLUMNS = "GSM8K %, train loss, forgetting, most GiB, mean GiB, total s, train s, file MiB"


def _row(name: str, parameters: str, lr: str, *values: float) -> Row:
    changes = HOW.get(name)
    if changes is not None and lr != LR:
        changes = (*changes, f"optimizer.lr={lr}")
    return Row(name, by_task(COLUMNS, *values), SOURCE, parameters, "", changes)


PUBLISHED = (
    _row("lily / rank140-mlp-a2-b2-s8.0", "9,485,280", "1e-4", 52.62, 0.5322, 0.216, 23.86, 14.82, 1572, 1324, 796.37),
    _row("hira / rank32-lr4.5e-3", "9,175,040", "4.5e-3", 51.33, 0.5626, 0.13, 21.98, 14.81, 1512, 1286, 35.01),
    _row("lora / rank64-rslora", "18,350,080", "1e-4", 51.33, 0.5663, 0.111, 21.01, 13.64, 1160, 966, 70.01),
    _row(
        "shira / lr_0.0003-random_seed_42", "9,175,040", "3e-4", 51.02, 0.5788, 0.052, 20.19, 13.54, 1232, 1003, 105.01
    ),
    _row("frod / default", "5,456,808", "1e-4", 50.87, 0.5861, 0.079, 21.87, 14.93, 3392, 2495, 59.71),
    _row("lily / rank896-a2-b2-s2.0", "18,450,432", "1e-4", 50.49, 0.5756, 0.11, 21.91, 14.13, 1442, 1216, 1372.41),
    _row("miss / bat", "7,340,032", "1e-4", 50.42, 0.5766, 0.194, 23.46, 16.09, 1698, 1409, 28.01),
    _row("gralora / rank32", "9,175,040", "2e-4", 49.51, 0.5921, 0.057, 20.77, 13.44, 1350, 1097, 35.01),
    _row("lora / rank10-target-mlp", "9,461,760", "1e-4", 49.43, 0.5811, 0.032, 23.00, 14.43, 1269, 1050, 36.11),
    _row("oft / rank32", "8,171,520", "1e-4", 49.13, 0.5948, 0.041, 20.80, 13.57, 1447, 1192, 31.18),
    _row("c3a / default", "5,505,024", "0.3", 48.75, 0.5813, 0.165, 20.54, 13.34, 1396, 1171, 21.01),
    _row("lora / rank14-target-mlp-bdlora", "8,429,568", "1e-4", 48.67, 0.5827, 0.03, 22.99, 14.42, 1485, 1239, 32.18),
    _row("miss / default", "7,340,032", "1e-4", 48.67, 0.5774, 0.197, 18.88, 12.52, 1094, 897, 28.01),
    _row("deft / rank32", "9,175,040", "1e-4", 48.22, 0.5916, 0.063, 22.00, 13.99, 1259, 1055, 35.01),
    _row("lora / rank32", "9,175,040", "1e-4", 47.84, 0.6068, 0.05, 20.76, 13.41, 1153, 942, 35.01),
    _row("randlora / default", "9,289,728", "1e-4", 47.76, 0.5773, 0.203, 21.22, 14.08, 1656, 1423, 2108.84),
    _row("lora / rank64", "18,350,080", "1e-4", 47.38, 0.5931, 0.059, 21.00, 13.67, 1186, 967, 70.01),
    _row(
        "full-finetuning / lr_0.00001", "3,212,749,824", "1e-5", 47.16, 0.5988, 0.03, 36.20, 31.98, 2375, 2147, 6127.83
    ),
    _row("lora / rank32-dora", "9,289,728", "1e-4", 46.93, 0.6067, 0.051, 22.85, 14.36, 1471, 1191, 35.46),
    _row("delora / rank32", "9,175,096", "1e-3", 46.78, 0.5916, 0.046, 20.82, 13.46, 1266, 1053, 35.68),
    _row("lokr / rank32-factor4-lr0.003", "2,294,656", "3e-3", 46.63, 0.5979, 0.105, 21.97, 14.72, 1502, 1292, 8.77),
    _row("ia3 / all-attn-5k-lr0.005", "630,784", "5e-3", 45.49, 0.5957, 0.314, 24.35, 15.07, 1261, 1060, 2.43),
    _row("psoft / fast", "1,856,512", "1e-4", 44.96, 0.6241, 0.051, 19.35, 12.88, 1483, 1201, 7.10),
    _row(
        "peanut / rank32-relu-depth0-s2.0", "7,340,032", "1e-4", 44.88, 0.6226, 0.068, 23.48, 16.10, 1599, 1339, 28.01
    ),
    _row("psoft / default", "1,856,512", "1e-4", 44.88, 0.6242, 0.053, 20.49, 14.00, 2027, 1557, 7.10),
    _row("deft / rank32-para", "3,670,016", "1e-4", 43.37, 0.6350, 0.078, 20.04, 13.01, 1296, 1052, 14.01),
    _row("lora / rank32-mica", "5,505,024", "1e-4", 43.06, 0.6257, 0.079, 20.72, 13.40, 1211, 977, 35.01),
    _row("osf / rank128", "194,535,936", "5e-5", 42.68, 0.6308, 0.017, 35.90, 27.92, 3570, 2653, 371.13),
    _row("glora / default", "4,587,520", "1e-4", 41.85, 0.6412, 0.036, 20.05, 13.39, 1332, 1089, 18.31),
    _row(
        "prefixtuning / tokens50-init_prefix-lr_0.005",
        "2,867,200",
        "5e-3",
        41.62,
        0.6229,
        0.198,
        19.17,
        12.56,
        1073,
        878,
        10.94,
    ),
    _row("lora / rank32-lorafa", "3,670,016", "1e-4", 40.41, 0.6510, 0.061, 20.71, 13.38, 1367, 1159, 35.01),
    _row("waveft / n_frequency-5000", "280,000", "1e-4", 40.26, 0.6399, 0.108, 23.19, 16.03, 2605, 2112, 1.08),
    _row("ia3 / lr_0.001", "286,720", "1e-3", 39.80, 0.6569, 0.05, 21.64, 13.77, 1153, 944, 1.10),
    _row("peanut / rank1-relu-depth0-s32.0", "229,376", "1e-4", 39.73, 0.6497, 0.09, 23.41, 16.00, 1532, 1296, 0.89),
    _row("loha / rank32", "18,350,080", "1e-4", 39.27, 0.6570, 0.032, 22.27, 14.97, 1660, 1397, 70.03),
    _row("road / lr_0.001", "229,376", "1e-3", 38.51, 0.6837, 0.073, 21.25, 13.53, 1194, 979, 0.89),
    _row("adaptionprompt / lr_5e-3", "8,601,628", "5e-3", 38.36, 0.6429, 0.195, 20.91, 13.47, 1443, 1140, 16.41),
    _row("miss / mini", "229,376", "1e-4", 37.98, 0.6536, 0.149, 18.82, 12.44, 1160, 960, 0.88),
    _row("adalora / rank32", "18,353,664", "1e-4", 37.30, 0.6862, 0.022, 21.22, 13.89, 1441, 1169, 33.50),
    _row("glora / vector-paths", "229,376", "5e-4", 37.15, 0.6613, 0.258, 19.98, 13.36, 1246, 1019, 1.68),
    _row(
        "prefixtuning / lr_0.005_zero_init", "11,468,800", "5e-3", 35.78, 0.6789, 0.396, 20.45, 13.01, 1289, 1013, 43.75
    ),
    _row("pvera / rank64", "121,856", "3e-3", 35.63, 0.7266, 0.081, 20.09, 13.02, 1258, 1017, 2.73),
    _row("vera / default", "129,024", "1e-3", 35.41, 0.6927, 0.099, 20.14, 13.03, 1246, 1011, 6.51),
    _row("pvera / default", "143,360", "3e-3", 35.33, 0.7355, 0.076, 20.65, 13.25, 1299, 1082, 9.56),
    _row("ptuning / default", "28,382,208", "1e-4", 34.95, 0.6733, 0.129, 19.48, 13.06, 1136, 914, 0.23),
    _row("adamss / rank32", "293,888", "1e-4", 34.50, 0.7260, 0.036, 18.93, 12.53, 5443, 4551, 67.20),
    _row("boft / default", "802,816", "1e-4", 34.34, 0.7268, 0.024, 23.00, 16.01, 9702, 6926, 3.08),
    _row(
        "prompt_tuning / sample_vocab-lr_0.001", "614,400", "1e-3", 34.34, 0.6594, 0.145, 22.73, 16.33, 1761, 1429, 2.34
    ),
    _row("vblora / default", "1,212,416", "1e-4", 33.36, 0.7142, 0.051, 20.66, 13.33, 1440, 1198, 4.64),
    _row("beft / target-v_proj", "28,672", "1e-4", 32.07, 0.7325, 0.19, 18.79, 12.41, 1097, 881, 0.11),
    _row("ia3 / default", "286,720", "1e-4", 31.08, 0.7658, 0.019, 21.64, 13.77, 1227, 987, 1.10),
    _row("frod / sparse0.02-lr_0.001", "10,741,640", "1e-3", 27.07, 0.6584, 1.675, 22.24, 15.25, 3599, 2613, 82.75),
    _row("trainable_tokens / sos+eos", "6,144", "0.2", 24.56, 0.7899, 0.826, 19.50, 13.43, 1234, 981, 0.05),
    _row("prompt_tuning / lr_0.001", "614,400", "1e-3", 23.43, 0.7791, 0.406, 22.72, 16.32, 1810, 1480, 2.34),
    _row("adaptionprompt / lr_0.0005", "8,601,628", "5e-4", 21.15, 0.8321, 0.218, 20.91, 13.47, 1476, 1178, 16.41),
    _row("prefixtuning / lr_0.001", "11,468,800", "1e-3", 18.57, 0.7886, 1.785, 20.45, 13.01, 1306, 1014, 43.75),
    _row("fourierft / n_frequency-5000", "280,000", "1e-4", 9.55, 0.9976, 0.163, 22.04, 14.68, 2145, 1722, 1.08),
    _row("prompt_tuning / default", "614,400", "1e-4", 5.69, 1.0654, 0.742, 22.72, 16.32, 1807, 1473, 2.34),
    _row("tinylora / default", "3,584", "1e-3", 1.21, 1.1733, 0.276, 18.74, 12.40, 1321, 1036, 2.28),
    _row("tinylora / weight-tying", "64", "1e-3", 0.45, 1.2759, 0.11, 18.74, 12.40, 1323, 1037, 2.26),
    _row("unilora / default", "256", "1e-4", 0.15, 1.3413, 0, 20.78, 13.44, 1331, 1075, 0.00),
    _row("fourierft / default", "56,000", "1e-4", 0.00, 1.2480, 0.019, 22.03, 14.67, 2116, 1699, 0.22),
    _row("ln_tuning / default", "175,104", "1e-4", 0.00, 1.2373, 0.009, 19.73, 12.87, 1145, 918, 0.34),
)
UNKNOWN = (
    "How much scores vary with the seed: all have seed 0. The binomial error at 48 % is 1.4 points, and the same seed "
    "again varies by 0.7: call less than 2 points a tie. Training losses vary by 0.0002 and tell more.",
    "Why accuracies of the same 38 experiments fell by 1.65 points from January to July 2026 while losses stayed: "
    "accuracies of other dates are not to be compared.",
    "The best learning rate of most methods: IA3 and prompts move by 10 to 30 points with it.",
    "Settings of HiRA, SHiRA, C3A, RandLoRA, VeRA and MiSS but for what names and counts say: C3A's block of 64 "
    "follows from its count.",
)
NEEDS = (
    "meta-math/MetaMathQA from the hub, and GSM8K as $SBORAX_DATA/gsm8k/test.jsonl.",
    "meta-llama/Llama-3.2-3B is gated.",
)
DIFFERS = (
    "PEFT drops samples of more than 1,300 characters and takes the first 20,000 that are left, in their order and in "
    "buckets by length. Here those of more than 768 tokens are dropped from the first 20,000, in an order drawn by "
    "seed_data.",
    "Full fine-tuning keeps the weights that it trains in float32, where PEFT trains in bfloat16.",
    "Forgetting is the loss on 100 texts of Wikipedia after less before; `sborax eval --tasks wikitext2` of run and "
    "base measures the like.",
    "Settings are those of the experiments' files in PEFT at the commits that were read: LoHa, AdaLoRA, LoRA-FA and "
    "LoRA on the MLP at 1948110, LoRA of rank 64 at f8bbafe, LoKr at 63a21ad, DeLoRA at 42aa7c2, IA3 at 7285473, OFT "
    "at 711075f, whose rank of 32 over 3,072 inputs is a block of 96, FourierFT at 1948110, RoAd at 493e753, "
    "GraLoRA at 005745b, WaveFT at f8bbafe, PVeRA at 49e426f and bd7ce70, TinyLoRA at 6d71a28, PEANuT at 814c32d and "
    "5fbf730, PSOFT at f8bbafe and 95a929d, whose fast form has a randomised SVD there and an exact one here.",
    "PEFT's FourierFT starts from random coefficients, so not from the base.",
    "PEFT's FRoD trains L, which weight decay draws to 0; here l = L - L0 is drawn to 0.",
)
