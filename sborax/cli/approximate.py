"""`sborax merge --approximate`: adapters whose layers are linked by values, merged as well as a weight can."""

from typing import Any

import jax
import jax.numpy as jnp

from sborax.cli.targets import Target
from sborax.config.terminal import say
from sborax.interop.reslora import merge_by_inputs, merge_by_weights
from sborax.train.hints import first_batches
from sborax.train.read import read_data

MEASURED = 8
"""Microbatches on which the error is measured."""


def approximated(target: Target, by: str) -> Any:
    """The merged params of a run whose layers are linked by values, measured on the first batches of its data."""
    assert target.experiment is not None
    model, params, adapters = target.model, target.params, target.adapters
    held = first_batches(read_data(target.experiment, model, lambda _: None)[0], MEASURED)

    @jax.jit
    def hidden(params: Any, adapters: Any, batch: Any) -> Any:
        states = model.hidden(params, adapters, batch["tokens"], segment_ids=batch["segments"])
        return jnp.where(batch["segments"][:, :, None] != 0, states, jnp.zeros_like(states))

    def outputs(params: Any, adapters: Any) -> Any:
        return jnp.concatenate([hidden(params, adapters, batch).reshape(-1) for batch in held])

    if by == "weights":
        done = merge_by_weights(params, adapters, outputs)
    else:

        @jax.jit
        def seen(batch: dict[str, Any]) -> dict[str, Any]:
            tokens, segments = batch["tokens"], batch["segments"]
            return model.collect(params, adapters, tokens, ["remembered"], segment_ids=segments)[1].remembered

        done = merge_by_inputs(params, adapters, [seen(batch) for batch in held], outputs)
    say(done)
    return done.params
