"""Configs of PEFT's kinds of adapters, for the tiny model of `torch_pair`."""

import peft
from torch_pair import ALL

TWO = ["q_proj", "v_proj"]
LORA = {"r": 4, "lora_alpha": 6, "target_modules": TWO}
KINDS = {
    "LoRA": peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL),
    "rsLoRA": peft.LoraConfig(**LORA, use_rslora=True),
    "DoRA": peft.LoraConfig(**LORA, use_dora=True, use_rslora=True),
    "PiSSA": peft.LoraConfig(**LORA, init_lora_weights="pissa"),
    "OLoRA": peft.LoraConfig(**LORA, init_lora_weights="olora"),
    "MISS": peft.MissConfig(r=5, target_modules=TWO),
    "MISS-bat": peft.MissConfig(r=8, init_weights="bat", target_modules=TWO),
    "MISS-mini": peft.MissConfig(r=4, mini_r=8, init_weights="mini", target_modules=TWO),
    "patterns": peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=r"model\.layers\.\d+\.self_attn\.(q|v)_proj",
        rank_pattern={"layers.1.self_attn.v_proj": 3, "q_proj": 2},
        alpha_pattern={"q_proj": 16},
    ),
    "aLoRA": peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=ALL, alora_invocation_tokens=[32, 17], task_type="CAUSAL_LM"
    ),
    "one layer": peft.LoraConfig(**LORA, layers_to_transform=[1]),
    "head": peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
    "modules_to_save": peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["norm", "lm_head"]),
}
"""LORA and MISS."""

MIXED = ["q_proj", "down_proj"]
"""A projection of the attention and one of the MLP, of different shapes."""
FILES = {
    "KaSA": peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=MIXED, rank_pattern={"q_proj": 3}, kasa_config=peft.KasaConfig(beta=0.1)
    ),
    "BDLoRA": peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[*MIXED, "v_proj"],
        rank_pattern={"q_proj": 2},
        use_bdlora=peft.BdLoraConfig(["down_proj"], ["q_proj"], nblocks=2, match_strict=False),
    ),
    "MonteCLoRA": peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=MIXED,
        rank_pattern={"q_proj": 3},
        monteclora_config=peft.MontecloraConfig(num_samples=3, sample_scaler=0.02, buffer_size=2),
    ),
    "VeLoRA": peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=MIXED,
        rank_pattern={"q_proj": 3},
        velora_config=peft.VeloraConfig(num_groups=5, init_type="random"),
    ),
    "AdaLoRA": peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=MIXED),
    "IA3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": peft.LoHaConfig(r=3, alpha=5, target_modules=MIXED, rank_pattern={"q_proj": 2}),
    "LoKr": peft.LoKrConfig(r=2, alpha=3, target_modules=MIXED, alpha_pattern={"layers.1.mlp.down_proj": 7}),
    "LoKr-whole": peft.LoKrConfig(r=6, alpha=3, target_modules=MIXED, decompose_factor=4),
    "LoKr-both": peft.LoKrConfig(r=1, target_modules=MIXED, decompose_both=True, layers_to_transform=[1]),
    "HiRA": peft.HiraConfig(r=4, target_modules=MIXED),
    "GLoRA": peft.GloraConfig(r=4, target_modules=MIXED),
    "GLoRA-vector": peft.GloraConfig(
        r=3, config_A_B="vector", config_C="vector", config_D_E="vector", target_modules=["q_proj", "up_proj"]
    ),
    "GLoRA-constant": peft.GloraConfig(config_A_B="constant", config_C="none", target_modules=MIXED),
    "DeLoRA": peft.DeloraConfig(r=4, delora_lambda=3, target_modules=MIXED, bias="none"),
    "OFT": peft.OFTConfig(oft_block_size=8, target_modules=MIXED),
    "OFT-exact": peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, block_share=True, target_modules=MIXED),
    "BOFT": peft.BOFTConfig(boft_block_size=8, target_modules=MIXED, layers_to_transform=[1]),
    "BOFT-butterfly": peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=MIXED),
    "SuperTuning": peft.SupertuningConfig(sparsity=0.9, target_modules=MIXED),
    "SuperTuning-hybrid": peft.SupertuningConfig(
        sparsity=0.95, select_top=False, r=3, lora_alpha=5, target_modules=MIXED
    ),
    "DEFT": peft.DeftConfig(r=4, target_modules=MIXED, layers_to_transform=[1]),
    "DEFT-qr": peft.DeftConfig(r=4, alpha=6, decomposition_method="qr", target_modules=MIXED),
    "OSF": peft.OSFConfig(effective_rank=27, target_modules=MIXED),
    "HRA": peft.HRAConfig(r=4, target_modules=MIXED),
    "SHiRA": peft.ShiraConfig(r=2, random_seed=0, target_modules=MIXED),
    "VeRA": peft.VeraConfig(r=6, target_modules=MIXED, d_initial=1.0),
    "PVeRA": peft.PveraConfig(r=6, target_modules=MIXED, d_initial=1.0, generator_seed=3),
    "TinyLoRA": peft.TinyLoraConfig(r=3, u=5, target_modules=MIXED, init_weights="uniform", init_v_bound=0.5),
    "PEANuT": peft.PeanutConfig(r=4, scaling=2.5, target_modules=MIXED),
    "PEANuT-deep": peft.PeanutConfig(r=4, depth=2, act_fn="silu", target_modules=MIXED, layers_to_transform=[1]),
    "VBLoRA": peft.VBLoRAConfig(r=3, num_vectors=20, vector_length=8, init_vector_bank_bound=0.5, target_modules=MIXED),
    "VBLoRA-chosen": peft.VBLoRAConfig(
        r=3, num_vectors=20, vector_length=8, topk=3, save_only_topk_weights=True, target_modules=MIXED
    ),
    "UniLoRA": peft.UniLoraConfig(
        r=3, theta_d_length=50, init_theta_d_bound=2.0, save_indices=True, target_modules=MIXED
    ),
    "UniLoRA-seed": peft.UniLoraConfig(
        r=3, theta_d_length=47, init_theta_d_bound=2.0, proj_seed=5, target_modules=MIXED, layers_to_transform=[1]
    ),
    "Lily": peft.LilyConfig(r=4, stride_A=2, num_B=3, scaling=1.5, target_modules=MIXED),
    "Lily-layer": peft.LilyConfig(r=5, target_modules=["q_proj", "k_proj"], layers_to_transform=[1]),
    "FRoD": peft.FrodConfig(sparse_rate=0.05, target_modules=MIXED, progressbar=False),
    "FRoD-layer": peft.FrodConfig(
        sparse_rate=0.2, regularization_alpha=0.1, target_modules=TWO, layers_to_transform=[0, 1], progressbar=False
    ),
    "RandLoRA": peft.RandLoraConfig(r=8, randlora_alpha=80, target_modules=["q_proj", "up_proj", "down_proj"]),
    "C3A": peft.C3AConfig(block_size=8, target_modules=MIXED, block_size_pattern={"q_proj": 16}),
    "FourierFT": peft.FourierFTConfig(
        n_frequency=40, scaling=60.5, random_loc_seed=3, target_modules=MIXED, n_frequency_pattern={"q_proj": 9}
    ),
    "RoAd": peft.RoadConfig(group_size=8, target_modules=MIXED),
    "RoAd-2": peft.RoadConfig(variant="road_2", group_size=32, target_modules=MIXED),
    "RoAd-4": peft.RoadConfig(variant="road_4", group_size=2, target_modules=["q_proj", "up_proj"]),
    "WaveFT": peft.WaveFTConfig(
        n_frequency=40, scaling=20.5, random_loc_seed=3, target_modules=MIXED, n_frequency_pattern={"q_proj": 9}
    ),
    "WaveFT-plain": peft.WaveFTConfig(n_frequency=40, use_idwt=False, target_modules=MIXED),
    "GraLoRA": peft.GraloraConfig(r=4, alpha=6, target_modules=MIXED),
    "GraLoRA-hybrid": peft.GraloraConfig(r=8, hybrid_r=3, gralora_k=4, target_modules=MIXED, layers_to_transform=[1]),
}
"""The other kinds."""
