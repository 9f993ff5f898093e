"""The training step and the evaluation step: pure functions, jit-compiled once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from loro_jax.layers.common import Fixed
from loro_jax.training.config import Config
from loro_jax.training.distillation import abstract_teacher, with_terms
from loro_jax.training.mesh import batch_sharding, replicated, tree_shardings
from loro_jax.training.methods import make_maintenance, make_optimizer, make_schedule
from loro_jax.training.tasks import task_of
from models.layout import laid_out_on

Array = jax.Array


class TrainState(NamedTuple):
    """Everything that changes in training.

    Attributes:
        step: steps taken, int32 scalar.
        params: the model's parameters as nested dicts.
        opt_state: the optimizer's state.
        fixed: the model's arrays that have no gradient, as nested dicts; empty for most methods.
    """

    step: Array
    params: Any
    opt_state: Any
    fixed: Any


class Program(NamedTuple):
    """The pure functions of a run.

    Attributes:
        init: () -> TrainState, from the seed.
        train_step: (TrainState, Batch) -> (TrainState, metrics); with a teacher, its parameters are
            the third argument.
        eval_step: (params, fixed, Batch) -> the task's outputs; of a language model: (sum of losses
            in nats, number of tokens).
        loss_and_gradient: (params, fixed, Batch) -> (mean loss, its gradient), the part of a
            training step before the optimizer, without distillation.
        teacher: shapes and dtypes of the teacher's parameters, nested dicts; None: there is none.
    """

    init: Callable[[], TrainState]
    train_step: Callable[..., tuple[TrainState, dict[str, Array]]]
    eval_step: Callable[[Any, Any, Any], Any]
    loss_and_gradient: Callable[[Any, Any, Any], tuple[Array, Any]]
    teacher: Any = None


def make_program(config: Config, mesh: jax.sharding.Mesh | None = None) -> Program:
    """Builds the functions of a run; nothing is computed yet.

    Args:
        config: a validated config.
        mesh: the devices that share the exact steps.

    Returns:
        The functions, to be compiled by the caller (see :func:`compile_program`).
    """
    task = task_of(config)
    schedule = make_schedule(config)
    maintenance = make_maintenance(config)
    # The graph and the shardings need only shapes; parameters are first created in init, where jit
    # places them on their devices.
    abstract_model = nnx.eval_shape(task.make)
    graphdef = nnx.graphdef(abstract_model)
    shardings = None
    if mesh is not None:
        shardings = tree_shardings(mesh, nnx.to_pure_dict(nnx.state(abstract_model, nnx.Param)))
    optimizer = make_optimizer(config, shardings)

    def init() -> TrainState:
        model = task.make()
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        fixed = nnx.to_pure_dict(nnx.state(model, Fixed))
        return TrainState(jnp.zeros([], jnp.int32), params, optimizer.init(params), fixed)

    def network(params: Any, fixed: Any) -> Any:
        return nnx.merge(graphdef, joined(params, fixed))

    def differentiated(loss_sum: Callable[[Any, Any, Any], Array]) -> Any:
        return make_loss_and_gradient(loss_sum, task.number, config, mesh)

    loss_and_gradient = differentiated(lambda p, fixed, batch: task.loss(network(p, fixed), batch))
    loss_and_terms = with_terms(config, network, loss_and_gradient, differentiated)

    def train_step(
        state: TrainState, batch: Any, *beside: Any
    ) -> tuple[TrainState, dict[str, Array]]:
        loss, grads, terms = loss_and_terms(state.params, state.fixed, batch, *beside)
        # Gradients are pinned to the parameters' shardings, so that the exact step's resharding is
        # not propagated into the backward pass.
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings)
        # Clipping is done here and not by optax.clip_by_global_norm, because the norm is a metric.
        grad_norm = optax.tree.norm(grads)
        if config.clip_norm > 0:
            # The maximum keeps a gradient of zero at zero, without a division by it.
            shrink = jnp.minimum(1.0, config.clip_norm / jnp.maximum(grad_norm, 1e-12))
            grads = jax.tree.map(lambda g: g * shrink.astype(g.dtype), grads)
        params, fixed, opt_state = state.params, state.fixed, state.opt_state
        if maintenance.before is not None:
            grads, params, fixed, opt_state = maintenance.before(
                state.step, grads, params, fixed, opt_state
            )
        # The name marks the optimizer's operations in profiles.
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        # Maintenance after the step counts steps taken, maintenance before it counts from 0.
        step = optax.safe_increment(state.step)
        if maintenance.after is not None:
            params, fixed, opt_state = maintenance.after(step, params, fixed, opt_state)
        metrics = {
            "loss": loss,
            "tokens": task.tokens(batch),
            # Of this step, whose number from 0 is the count before it.
            "lr": jnp.asarray(schedule(state.step), jnp.float32),
            "grad_norm": grad_norm,
            "update_norm": optax.tree.norm(updates),
            # Number of matrices so far that were too ill-conditioned for the fast exact step.
            "fallbacks": getattr(opt_state, "fallbacks", jnp.zeros([], jnp.int32)),
        }
        metrics |= terms
        if maintenance.metrics is not None:
            metrics |= maintenance.metrics(params, opt_state)
        return TrainState(step, params, opt_state, fixed), metrics

    def eval_step(params: Any, fixed: Any, batch: Any) -> Any:
        with laid_out_on(mesh):
            return task.evaluate(network(params, fixed), batch)

    teacher = abstract_teacher(config)
    shapes = None if teacher is None else nnx.to_pure_dict(nnx.state(teacher))
    return Program(init, train_step, eval_step, loss_and_gradient, shapes)


def make_loss_and_gradient(
    loss_sum: Callable[[Any, Any, Any], Array],
    number: Callable[[Any], Array],
    config: Config,
    mesh: jax.sharding.Mesh | None,
) -> Callable[[Any, Any, Any], tuple[Array, Any]]:
    """Returns a function (params, fixed, batch) -> (mean loss, its gradient).

    Args:
        loss_sum: (params, fixed, batch) -> sum of the losses of the batch's tokens, or rows.
        number: batch -> number of these.
        config: the run's config.
        mesh: the devices that share a batch.
    """

    def loss_and_gradient(params: Any, fixed: Any, batch: Any) -> tuple[Array, Any]:
        # Divided by the tokens (or rows) of the whole batch, because micro-batches may have
        # different numbers of unmasked ones. A batch without any has a loss of 0.
        divisor = jnp.maximum(number(batch), 1.0)

        def of_part(batch: Any, groups: str | None = None) -> tuple[Array, Any]:
            with laid_out_on(mesh, without=groups):
                return _loss_and_gradient(
                    lambda p, b: loss_sum(p, fixed, b) / divisor,
                    params,
                    batch,
                    config.gradient_accumulation,
                )

        if mesh is None or mesh.shape["data"] == 1:
            return of_part(batch)
        # Each group of devices along ``data`` accumulates the gradients of its own micro-batches,
        # as one entry of a leading axis; the groups are summed once, after the last micro-batch.
        # The mean's divisor is of the whole batch, so that these sums need no weights.
        parts = jax.tree.map(lambda x: x.reshape(mesh.shape["data"], -1, *x.shape[1:]), batch)
        parts = jax.lax.with_sharding_constraint(
            parts, NamedSharding(mesh, PartitionSpec("data", "fsdp"))
        )
        sums = jax.vmap(lambda part: of_part(part, "data"), spmd_axis_name="data")(parts)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)

    return loss_and_gradient


def joined(one: Any, other: Any) -> Any:
    """Merges two nested dicts that have no leaf in common."""
    return one | {
        name: joined(one[name], value) if name in one else value for name, value in other.items()
    }


def _loss_and_gradient(
    loss: Callable[[Any, Any], Array], params: Any, batch: Any, micro_batches: int
) -> tuple[Array, Any]:
    """Computes a loss that is a sum over the batch, and its gradient, in sequential micro-batches.

    Sums are accumulated in float32, and the optimizer sees a single gradient (its exact step must
    not run once per micro-batch).
    """
    value_and_grad = jax.value_and_grad(loss)
    if micro_batches == 1:
        return value_and_grad(params, batch)
    # Interleaved, so that a batch that is sharded over devices stays sharded in every part.
    parts = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total: tuple[Array, Any], part: Any) -> tuple[tuple[Array, Any], None]:
        return jax.tree.map(jnp.add, total, value_and_grad(params, part)), None

    zero = (jnp.zeros([], jnp.float32), optax.tree.zeros_like(params, dtype=jnp.float32))
    (total, grads), _ = jax.lax.scan(add, zero, parts)
    return total, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)


def merge_model(config: Config, params: Any, fixed: Any) -> Any:
    """Builds the model of a run from the trained and the fixed part of its state.

    Args:
        config: the run's config.
        params: trained parameters, nested dicts.
        fixed: arrays that are not trained, nested dicts.

    Returns:
        The model.
    """
    abstract = nnx.eval_shape(task_of(config).make)
    return nnx.merge(nnx.graphdef(abstract), joined(params, fixed))


def abstract_state(program: Program, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns shapes, dtypes and shardings of a run's state; nothing is computed."""
    # Jitted, so that the function that makes the state finds its trace.
    abstract = jax.jit(program.init).eval_shape()
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        tree_shardings(mesh, abstract),
    )


def placed_teacher(program: Program, mesh: jax.sharding.Mesh) -> tuple[Any, ...]:
    """Returns shapes, dtypes and shardings of a training step's further arguments: the teacher.

    Returns:
        A tuple of one tree; of none without a teacher.
    """
    if program.teacher is None:
        return ()
    shardings = tree_shardings(mesh, program.teacher)
    return (
        jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            program.teacher,
            shardings,
        ),
    )


def compile_program(program: Program, mesh: jax.sharding.Mesh) -> tuple[Program, Any]:
    """Wraps the functions in ``jax.jit`` with their shardings; the train step donates its state.

    Args:
        program: functions from :func:`make_program`.
        mesh: devices from :func:`loro_jax.training.mesh.make_mesh`.

    Returns:
        The jitted functions and the abstract state (shapes, dtypes, shardings) for a restore.
    """
    abstract = abstract_state(program, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    everywhere = replicated(mesh)
    batch = batch_sharding(mesh)
    beside = jax.tree.map(lambda x: x.sharding, placed_teacher(program, mesh))
    jitted = Program(
        # Parameters are created sharded: no device has to hold the whole model, even at the start.
        init=jax.jit(program.init, out_shardings=shardings),
        # Without donation the old and the new state would exist at the same time.
        train_step=functools.partial(jax.jit, donate_argnums=0)(
            program.train_step,
            in_shardings=(shardings, batch, *beside),
            # The same out as in, because the new state is the next step's argument.
            out_shardings=(shardings, everywhere),
        ),
        eval_step=jax.jit(
            program.eval_step,
            in_shardings=(shardings.params, shardings.fixed, batch),
            out_shardings=everywhere,
        ),
        loss_and_gradient=jax.jit(
            program.loss_and_gradient,
            in_shardings=(shardings.params, shardings.fixed, batch),
            out_shardings=(everywhere, shardings.params),
        ),
        teacher=program.teacher,
    )
    return jitted, abstract
