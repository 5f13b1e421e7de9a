"""`sborax merge --approximate`: approximate merges of adapters whose layers are linked by values, such as ResLoRA's."""

from typing import Any

import jax
import jax.numpy as jnp

from sborax.cli.targets import Target
from sborax.config.terminal import say
from sborax.interop.reslora import merge_by_inputs, merge_by_weights
from sborax.train.hints import first_batches
from sborax.train.read import read_data

MEASURED = 8
"""How many microbatches the error is measured on."""


def merge_approximately(target: Target, by: str) -> Any:
    """The merged parameters of a run whose layers are linked by values.

    - target: the run. Its first batches are the data on which the error is measured, which is printed.
    - by: "inputs" or "weights", the two merges of `sborax.interop.reslora`.
    """
    assert target.experiment is not None
    model, params, adapters = target.model, target.params, target.adapters
    batches = first_batches(read_data(target.experiment, model, lambda _: None)[0], MEASURED)

    @jax.jit
    def hidden(params: Any, adapters: Any, batch: Any) -> Any:
        states = model.hidden(params, adapters, batch["tokens"], segment_ids=batch["segments"])
        return jnp.where(batch["segments"][:, :, None] != 0, states, jnp.zeros_like(states))

    def outputs(params: Any, adapters: Any) -> Any:
        return jnp.concatenate([hidden(params, adapters, batch).reshape(-1) for batch in batches])

    if by == "weights":
        merged = merge_by_weights(params, adapters, outputs)
    else:

        @jax.jit
        def inputs(batch: dict[str, Any]) -> dict[str, Any]:
            tokens, segments = batch["tokens"], batch["segments"]
            return model.collect(params, adapters, tokens, ["remembered"], segment_ids=segments)[1].remembered

        merged = merge_by_inputs(params, adapters, [inputs(batch) for batch in batches], outputs)
    say(merged)
    return merged.params
