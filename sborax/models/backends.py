"""Attention back ends: XLA on any device, cuDNN on NVIDIA GPUs, splash on TPUs.

All three keep packed samples apart, and padding on either side has no influence. Inputs that a back end cannot compute
are errors.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.extend.backend import get_backend
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from sborax.adapters.constraints import ROWS, dividing
from sborax.adapters.core import SboraxError
from sborax.models.attention import attention, padded
from sborax.models.cudnn import cudnn

Backend = Literal["xla", "cudnn", "splash"]
BACKENDS: tuple[Backend, ...] = ("xla", "cudnn", "splash")
ATTENDED = "attended"
"""The name under which `remat` keeps the output of attention."""
_LANES = 128
"""Splash's tiles are multiples of this many tokens."""
_TILE = 512
"""The largest tile of splash here, in tokens."""
_AMPERE = 8.0
"""Compute capability of the first GPUs with cuDNN's flash attention."""

Kernel = Callable[..., Float[Array, "batch seq heads head_dim"]]


def platform() -> str:
    """The kind of this process's devices: "cpu", "tpu", "cuda" from Ampere on, or another platform name of JAX."""
    backend = get_backend()
    if "cuda" in backend.platform_version and float(backend.devices()[0].compute_capability) >= _AMPERE:
        return "cuda"
    return backend.platform


def obstacle(name: Backend, device: str, dtype: Any, head_dim: int) -> str | None:
    """Why a back end cannot compute attention on such a device, or None if it can."""
    narrow = jnp.dtype(dtype).name in ("bfloat16", "float16")
    if name == "cudnn" and device != "cuda":
        return f"runs on NVIDIA GPUs from Ampere on, these devices are {device}"
    if name == "cudnn" and not narrow:
        return f"computes in bfloat16 or float16, not in {jnp.dtype(dtype).name}"
    if name == "cudnn" and (head_dim % 8 or head_dim > 128):
        return f"takes heads of a multiple of 8 up to 128 features, not of {head_dim}"
    if name == "splash" and device != "tpu":
        return f"runs on TPUs, these devices are {device}"
    if name == "splash" and jnp.dtype(dtype).name == "float16":
        return "computes in bfloat16 or float32, not in float16"
    return None


def choose(name: str, device: str, dtype: Any, head_dim: int, plain: bool = True) -> Backend:
    """The back end called `name`, or for "auto" the fastest that can compute this attention.

    plain: whether scores have neither windows nor caps.

    Raises SboraxError for an unknown name, and for a named back end that cannot compute it.
    """
    if name == "auto":
        native: dict[str, Backend] = {"cuda": "cudnn", "tpu": "splash"}
        preferred = native.get(device, "xla")
        return preferred if plain and obstacle(preferred, device, dtype, head_dim) is None else "xla"
    for backend in BACKENDS:
        if name == backend:
            why = obstacle(backend, device, dtype, head_dim)
            if backend != "xla" and not plain:
                why = "has neither windows nor caps of scores"
            if why is not None:
                raise SboraxError(f"attention: {name} {why}; use auto or xla")
            return backend
    raise SboraxError(f"attention: {name!r} is not one of auto, {', '.join(BACKENDS)}")


def attend(
    backend: str,
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    query_segments: Int[Array, "batch queries"] | None = None,
    key_segments: Int[Array, "batch keys"] | None = None,
    window: Int[Array, ""] | None = None,
    cap: float | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """`attention` by the named back end. Queries over a cache, which has more keys than queries, are left to XLA.

    Raises SboraxError for a window or a cap by another back end than XLA.
    """
    if backend != "xla" and (window is not None or cap is not None):
        raise SboraxError(f"attention: {backend} has neither windows nor caps of scores; use auto or xla")
    if backend == "xla" or query.shape[1] != key.shape[1]:
        return checkpoint_name(attention(query, key, value, query_segments, key_segments, window, cap), ATTENDED)
    return _on_each_device(KERNELS[backend])(query, key, value, query_segments)


def splash(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads head_dim"],
    segments: Int[Array, "batch seq"] | None,
    interpret: bool = False,
) -> Float[Array, "batch seq heads head_dim"]:
    """JAX's splash attention, on rows padded to whole tiles. Tiles above the diagonal are not computed."""
    length, (heads, head_dim) = query.shape[1], query.shape[2:]
    scaled = (query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype)
    inputs = (padded(x, _LANES).transpose(0, 2, 1, 3) for x in (scaled, key, value))
    tokens = length + -length % _LANES
    causal = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((tokens, tokens))] * heads)
    kernel = splash_attention_kernel.make_splash_mha(
        causal,
        block_sizes=_tiles(math.gcd(tokens, _TILE)),
        head_shards=1,
        q_seq_shards=1,
        # Residuals of the backward pass have this name too, so that `remat` can keep them.
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )
    ids = None
    if segments is not None:
        tiles = padded(segments, _LANES)
        ids = splash_attention_kernel.SegmentIds(tiles, tiles)
    out: Any = jax.vmap(kernel, in_axes=(0, 0, 0, None if ids is None else 0))(*inputs, ids)
    return out.transpose(0, 2, 1, 3)[:, :length]


def _named_cudnn(query: Array, key: Array, value: Array, segments: Array | None) -> Array:
    return checkpoint_name(cudnn(query, key, value, segments), ATTENDED)


KERNELS: dict[str, Kernel] = {"cudnn": _named_cudnn, "splash": splash}


def _tiles(size: int) -> splash_attention_kernel.BlockSizes:
    return splash_attention_kernel.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )


def _on_each_device(kernel: Kernel) -> Kernel:
    """`kernel`; on a mesh each device computes its own rows and heads, since the compiler cannot partition a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if not free:
        return kernel

    @functools.wraps(kernel)
    def mapped(query: Array, key: Array, value: Array, segments: Array | None) -> Array:
        optional = () if segments is None else (segments,)

        def shard(query: Array, key: Array, value: Array, *optional: Array) -> Array:
            return kernel(query, key, value, *(optional or (None,)))

        rows = dividing(query.shape[0], ROWS)
        heads = PartitionSpec(rows, None, dividing(math.gcd(query.shape[2], key.shape[2]), ("tensor",)), None)
        specs = (heads, heads, heads, *(PartitionSpec(rows, None) for _ in optional))
        sharded = jax.shard_map(shard, in_specs=specs, out_specs=heads, axis_names=free, check_vma=False)
        return sharded(query, key, value, *optional)

    return mapped
