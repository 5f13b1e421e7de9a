"""The same training step in PEFT on transformers, and with qwix's LoRA on our Flax model."""

import functools
import time
from typing import Any

from benchmarks.runner import calls_for
from benchmarks.shapes import EPS, SHAPES

THREADS = 2


def peft_step(case: dict[str, Any], steps: int, compiled: str = "") -> dict[str, Any]:
    """Measures PEFT's step, with SDPA attention and AdamW.

    compiled: by torch.compile, the "model" or each of its "layers"; nothing by default.
    """
    import torch
    from peft import LoraConfig, MissConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[case["shape"]], rms_norm_eps=EPS))
        torch.set_default_dtype(torch.float32)
    rank, targets = case["rank"], "all-linear"
    config = {
        "LoRA": lambda: LoraConfig(r=rank, lora_alpha=rank, target_modules=targets),
        "DoRA": lambda: LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, use_dora=True),
        "Bat": lambda: MissConfig(r=2 * rank, target_modules=targets, init_weights="bat"),
        "Bone": lambda: MissConfig(r=2 * rank, target_modules=targets),
    }[case["method"]]()
    model = get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=device == "cuda" or None)
    tokens = torch.randint(0, SHAPES[case["shape"]]["vocab_size"], (case["batch"], case["length"]), device=device)
    model.train()
    forward = torch.compile(model) if compiled == "model" else model
    if compiled == "layers":
        for layer in model.get_base_model().model.layers:
            layer.compile()

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def timed(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / calls

    first = timed(1)
    calls = calls_for(timed(1)) if device == "cuda" else 1
    seconds = [timed(calls) for _ in range(steps)]
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        from benchmarks.ours import peak_gib

        peak = peak_gib()
    measured = {"seconds": seconds, "peak_gib": peak, "trainable": sum(p.numel() for p in trained)}
    return measured | ({"compile_seconds": first} if compiled else {})


def qwix_step(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """Measures qwix's LoRA, which intercepts the plain projections of our Flax model, in turn with our step."""
    import jax
    import numpy as np
    import optax
    import qwix  # pyright: ignore[reportMissingImports]

    from benchmarks.ours import Case, plain_model, runner
    from benchmarks.runner import Runner, in_turn

    sizes = SHAPES[case["shape"]]
    plain = plain_model(sizes, case["dtype"]).module
    rank = case["rank"]
    # Without disable_jit qwix's parameters leak out of the compiled functions inside the model.
    provider = qwix.LoraProvider(module_path=".*(_proj).*", rank=rank, alpha=float(rank), disable_jit=True)
    model = qwix.apply_lora_to_model(plain, provider)
    tokens = np.random.default_rng(0).integers(0, sizes["vocab_size"], (case["batch"], case["length"])).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens[:1, :8])["params"]
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    is_lora = ["lora" in jax.tree_util.keystr(path) for path, _ in flat]
    train = [leaf for (_, leaf), trained in zip(flat, is_lora, strict=True) if trained]
    base = [leaf for (_, leaf), trained in zip(flat, is_lora, strict=True) if not trained]
    if not train:
        raise RuntimeError("qwix put no LoRA parameters on this model")
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-4, weight_decay=0.0))

    def loss(train: list[Any], base: list[Any], tokens: Any) -> Any:
        trained, frozen = iter(train), iter(base)
        params = jax.tree.unflatten(treedef, [next(trained if lora else frozen) for lora in is_lora])
        logits = model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, base: Any, tokens: Any) -> Any:
        train, opt = state
        value, grads = jax.value_and_grad(loss)(train, base, tokens)
        updates, opt = tx.update(grads, opt, train)
        return (optax.apply_updates(train, updates), opt), {"loss": value}

    theirs, (ours, _) = Runner.of(step, (train, tx.init(train)), base, tokens), runner(Case(**case))
    seconds, our_seconds = in_turn(theirs, ours, steps)
    trainable = sum(leaf.size for leaf in train)
    return {"seconds": seconds, "our_seconds": our_seconds, **theirs.compiled_facts(), "trainable": trainable}
