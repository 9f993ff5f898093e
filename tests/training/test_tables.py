"""A method, a direction and a projection are added from outside, by one entry each."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from loro_jax import peers
from loro_jax.commands.arms import load_config
from loro_jax.commands.compare import main
from loro_jax.errors import TrainingError
from loro_jax.fields import above, field
from loro_jax.layers.low_rank import LowRankLinear
from loro_jax.layers.projections import PROJECTIONS
from loro_jax.peers.coso import next_task
from loro_jax.planning.flops import flops_per_token
from loro_jax.study.report import Arm, Run, config_of
from loro_jax.training import methods
from loro_jax.training.config import Config
from loro_jax.training.config_differences import field_names
from loro_jax.training.fields import parse_change
from loro_jax.training.help import config_help
from loro_jax.training.loop import train
from loro_jax.training.method_options import settled
from loro_jax.training.methods import DIRECTIONS, METHODS, make_optimizer
from loro_jax.training.registry import Direction, Method
from loro_jax.training.report import final_report
from loro_jax.training.step import make_program
from models import Llama, preset
from tests.training import runs

SMALL = Config(
    steps=8,
    batch_size=4,
    sequence_length=32,
    warmup_steps=1,
    learning_rate=0.05,
    exact_every=4,
    restart_warmup_steps=2,
    exact_method="svd",  # the quickest to compile
    eval_every=8,
    checkpoint_every=8,
    log_every=1,
    tensorboard=False,
    model=preset("tiny", rank=4),
)


# What a file with a method holds: its options, and what makes its optimizer.
@dataclasses.dataclass
class SignOptions:
    stretch: float = field(1.0, above(0), "factor on every step")


def sign_descent(learning_rate, stretch):
    rate = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(optax.scale_by_sign(), optax.scale(stretch), rate)


# What a file with a projection holds.
class TanhLinear(LowRankLinear):
    linear = False

    def activated(self, latent):
        return jnp.tanh(latent)


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setitem(
        METHODS,
        "sign",
        Method(
            "signs of the gradients",
            lambda making: sign_descent(making.schedule, making.options.stretch),
            projection="tanh",
            uses=("exact_every",),
            options=SignOptions,
        ),
    )
    monkeypatch.setitem(
        DIRECTIONS,
        "lion",
        Direction("signs of averages", lambda config, options: optax.scale_by_lion(), lr_scale=0.3),
    )
    monkeypatch.setitem(PROJECTIONS, "tanh", TanhLinear)


@pytest.fixture
def small(tmp_path):
    data = dataclasses.replace(
        SMALL.data, source=str(runs.corpus(tmp_path)), tokenizer="bytes", max_eval_sequences=4
    )
    return dataclasses.replace(SMALL, data=data)


def losses(workdir):
    return [row["loss"] for row in runs.rows(workdir) if "loss" in row]


def test_a_method_from_outside_trains_with_its_options(toys, small, tmp_path):
    config = dataclasses.replace(small, method="sign", learning_rate=0.002)
    twice = dataclasses.replace(config, method_options={"stretch": 2.0})
    for name, one in (("once", config), ("twice", twice)):
        assert train(one, str(tmp_path / name)).exit_status == 0
        found = losses(tmp_path / name)
        assert len(found) == 8
        assert found[-1] < found[0] - 0.02
    assert losses(tmp_path / "twice")[-1] < losses(tmp_path / "once")[-1]
    stored = json.loads((tmp_path / "twice" / "config.json").read_text())
    assert stored["method_options"] == {"stretch": 2.0}
    with pytest.raises(TrainingError, match=r"stretch: 2\.0 there, 1\.0 now"):
        train(config, str(tmp_path / "twice"))


def test_a_projection_from_outside_is_what_the_model_is_made_of(toys, small):
    config = dataclasses.replace(small, method="sign")
    tokens = jnp.arange(8)[None] % 260

    def logits(kind):
        made = dataclasses.replace(config.model_config, projection=kind)
        return Llama(made, nnx.Rngs(0))(tokens)

    params = make_program(config).init().params["blocks"]["mlp"]["up"]
    assert set(params) == {"B", "A"}
    assert np.abs(logits("tanh") - logits("low_rank")).max() > 1e-4
    assert flops_per_token(config) == flops_per_token(dataclasses.replace(config, method="cola"))
    by_loro = dataclasses.replace(config.model, projection="tanh")
    assert dataclasses.replace(small, model=by_loro).model_config.projection == "low_rank"


@pytest.mark.slow
def test_a_direction_from_outside_trains(toys, small, tmp_path):
    config = dataclasses.replace(small, direction="lion", exact_every=0)
    assert train(config, str(tmp_path / "run")).exit_status == 0
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.02
    with pytest.raises(TrainingError, match="direction must be one of adam, orthogonal with"):
        dataclasses.replace(config, method="full").validate()


def test_what_was_added_is_known_everywhere(toys):
    dataclasses.replace(
        SMALL, exact_every=0, model=dataclasses.replace(SMALL.model, projection="tanh")
    ).model.validate()
    assert "method_options.stretch" in field_names()
    text = "\n".join(config_help())
    for expected in ("sign: signs of the gradients", "--config.method_options.stretch=1.0", "lion"):
        assert expected in text
    for field_name, value in (("method", "sine"), ("direction", "lyon")):
        with pytest.raises(TrainingError, match=r"one of .*(sign|lion)"):
            dataclasses.replace(SMALL, **{field_name: value}).validate()


class Recorder:
    """A config that notes which of its fields are read."""

    def __init__(self, config):
        self._config, self.read = config, set()

    def __getattr__(self, name):
        self.read.add(name)
        if name == "resolved_moments":
            self.read |= {"moments", "basis"}
        return getattr(self._config, name)


@pytest.mark.parametrize("method", METHODS)
def test_an_entry_names_the_fields_that_its_method_reads(method):
    recorder = Recorder(dataclasses.replace(SMALL, method=method))
    make_optimizer(recorder)
    methods.make_maintenance(recorder)
    of_some = {name for entry in METHODS.values() for name in entry.uses}
    assert recorder.read & of_some == set(METHODS[method].uses)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].options])
def test_options_have_the_defaults_of_the_functions_that_take_them(method):
    functions = {
        "lowrank": peers.lora_plus,
        "relora": peers.merge_and_restart,
        "switchlora": peers.switch,
        "preconditioned_exact": peers.preconditioned,
    }
    for one in dataclasses.fields(METHODS[method].options):
        if (method, one.name) == ("osft", "project_steps"):  # of the trainer alone
            continue
        function = functions.get(method) or getattr(peers, method)
        if (method, one.name) == ("coso", "threshold"):
            function = next_task
        assert inspect.signature(function).parameters[one.name].default == one.default


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("spectron", {"momentum": 0.5}),
        ("adarankgrad", {"eta": 0.5}),
        ("adarankgrad", {"basis": "svd", "scale": 0.5}),
        ("coso", {"scale": 0.5}),
        ("galore", {"scale": 0.5}),
        ("galore", {"basis": "dct"}),
        ("galore", {"moments": "reset"}),
        ("fira", {"basis": "columns", "moments": "rotate"}),
        ("frugal", {"density": 0.0}),
        ("frugal", {"basis": "random"}),
        ("frugal", {"order": "ascending"}),
        ("frugal", {"scale": 0.5}),
        ("frugal", {"remainder": "no"}),
        ("frugal", {"remainder_scale": 0.5}),
        ("gradnormlorp", {"scale": 0.5, "basis": "dct"}),
        ("fira", {"gamma": 2.0, "scale": 0.5}),
        ("dct_adamw", {"error_feedback": True, "scale": 0.5}),
        ("dct_adamw", {"max_side": 8}),
        ("trion", {"momentum": 0.5}),
        ("trion", {"newton_schulz_steps": 3, "shape_factor": "kimi"}),
        ("full", {"momentum": 0.5}),
        ("loro", {"momentum": 0.5}),
        ("loro", {"nesterov": False, "newton_schulz_steps": 3}),
        ("loro", {"damping": 0.5}),
        ("loro", {"equilibrate": True}),
        ("full", {"row_moment": 0.9}),
        ("loro", {"row_moment": 0.9}),
        ("preconditioned", {"damping": 1.0}),
    ],
)
def test_options_reach_the_optimizer(method, options):
    every = SMALL.exact_every if METHODS[method].periodic else 0
    plain = dataclasses.replace(
        SMALL, method=method, direction="orthogonal", exact_every=every, restart_warmup_steps=0
    )
    changed = dataclasses.replace(plain, method_options=options)
    changed.validate()
    shapes = {"W": (8, 6)} if METHODS[method].projection is None else {"B": (8, 4), "A": (4, 6)}
    # Grams that are not diagonal: Adam makes up for the scale of each entry.
    mixed = {
        name: jnp.eye(*shape) + jnp.cos(jnp.arange(np.prod(shape))).reshape(shape)
        for name, shape in shapes.items()
    }
    if METHODS[method].projection is None:
        mixed = jax.tree.map(lambda p: jnp.stack([p] * 4), mixed)  # some choose among layers
    params = {"blocks": {"up": mixed}, "bias": jnp.ones(3)}
    grads = [
        jax.tree.map(lambda p, i=i: jnp.sin(i + jnp.arange(p.size)).reshape(p.shape), params)
        for i in range(5)  # one more than up to the next subspace
    ]

    def moved(config):
        tx = make_optimizer(config)
        state, update = tx.init(params), jax.jit(tx.update)
        every = []
        for grad in grads:
            updates, state = update(grad, state, params)
            every += [np.ravel(leaf) for leaf in jax.tree.leaves(updates)]
        return np.concatenate(every)

    assert np.abs(moved(changed) - moved(plain)).max() > 1e-5


REFUSED = [
    ({"method": "lowrank", "direction": "orthogonal"}, "direction", "lowrank"),
    ({"method": "lowrank", "basis": "nearest"}, "basis", "lowrank"),
    ({"method": "galore", "damping": 0.1}, "damping", "galore"),
    ({"method": "galore", "lr_scale": 0.1}, "lr_scale", "galore"),
    ({"method": "full", "exact_every": 10}, "exact_every", "full"),
    ({"method": "dct_adamw", "exact_every": 10}, "exact_every", "dct_adamw"),
    ({"method": "spectron", "max_move": 0.1}, "max_move", "spectron"),
    ({"method": "cola", "moments": "keep"}, "moments", "cola"),
]


@pytest.mark.parametrize(("changes", "field_name", "method"), REFUSED)
def test_a_field_that_was_asked_for_in_vain_is_refused(changes, field_name, method):
    config = dataclasses.replace(Config(), **changes)
    with pytest.raises(TrainingError) as error:
        settled(config, changes)
    message = str(error.value)
    assert message.startswith(f"config.{field_name} = ")
    assert f'config.method = "{method}" does not use it' in message
    # What a config file has set is passed over, and so is a default that was asked for.
    assert settled(config, ["method"]) == config
    default = dataclasses.replace(config, **{field_name: getattr(Config(), field_name)})
    assert settled(default, changes) == default


def test_fields_that_are_used_are_taken():
    for changes in (
        {"method": "full", "direction": "orthogonal"},
        {"method": "full", "lr_scale": 0.1},
        {"method": "galore", "exact_every": 10},
        {"method": "loro", "basis": "nearest", "damping": 0.1},
        {"method": "lowrank", "weight_decay": 0.1},
    ):
        config = dataclasses.replace(Config(), **changes)
        assert settled(config, changes) == config


def test_options_of_another_method_are_passed_over_unless_they_were_asked_for():
    of_file = Config(method="spectron", method_options={"momentum": 0.5})
    config = settled(dataclasses.replace(of_file, method="galore"), ["method"])
    assert config.method_options == {}
    config.validate()
    with pytest.raises(TrainingError, match=r'config.method = "galore" has no such option'):
        settled(dataclasses.replace(of_file, method="galore"), ["method_options.momentum"])


def test_the_commands_that_a_run_proposes_leave_out_what_their_methods_lack(small):
    command = "python train.py --config.exact_every=4 --config.model.rank=8 --config.basis nearest"
    lines = final_report(small, 10.0, None, "out", f"{command} --config.data.source='a b'")
    dense = next(line for line in lines if "--config.method=full" in line)
    assert dense.split("train.py ")[1] == (
        "--config.model.rank=8 '--config.data.source=a b' --config.method=full --workdir=out_full"
    )


CONFIG = """
from loro_jax.text.config import DataConfig
from loro_jax.training.config import Config
from loro_jax.training.settings import with_settings
from models import preset


def get_config(settings="recommended"):
    config = Config(
        steps=4, batch_size=4, sequence_length=32, warmup_steps=1, eval_every=4, tensorboard=False,
        exact_method="svd",
        model=preset("tiny"),
        data=DataConfig(source={source!r}, tokenizer="bytes", max_eval_sequences=4),
    )
    return with_settings(config, settings)
"""


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("a=lowrank,direction=orthogonal", "config.direction = 'orthogonal': config.method = \"lo"),
        ("a=galore,exact_every=5,momentum=0.9", "config.method_options.momentum: config.method ="),
        ("a=loro,exact_until=3", "config.exact_until = 3: there is no such field any more"),
        ("a=loro,model.depth_scaled=true", "config.model.depth_scaled = True: there is no such"),
        (
            "a=loro,method_options.momentun=0.9",
            "--arm a=loro,method_options.momentun=0.9: expected",
        ),
        ("a=spectron,method_options.momentum=2", "config.method_options.momentum must be at least"),
    ],
)
def test_an_arm_is_refused_in_one_line(tmp_path, capsys, arm, message):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG.format(source=str(runs.corpus(tmp_path))))
    arguments = [str(path), "--methods=", f"--arm={arm}", f"--out={tmp_path / 'out'}"]
    assert main(arguments) == 1
    output = capsys.readouterr().err
    assert message in output
    assert output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_arms_with_old_names_are_what_they_were(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG.format(source="embedded"))
    base = load_config(str(path), [])

    def arm(text):
        method, *changes = text.split(",")
        found = Arm("a", method, tuple(parse_change(change) for change in changes))
        config = config_of(base, Run(found, 0.01, 0))
        config.validate()
        return json.loads(config.to_json())

    mergeable = arm(
        "loro,direction=orthogonal,basis=nearest,refresh=none,restart_warmup_steps=0,"
        "exact_every=2,model.initialiser=auto,model.projection=low_rank,exact_until=0"
    )
    assert (mergeable["moments"], mergeable["basis"]) == ("keep", "nearest")
    assert arm("loro,momentum=0.5")["method_options"]["momentum"] == 0.5
    assert arm("galore,exact_every=2,projection_scale=0.5")["method_options"]["scale"] == 0.5
    assert arm("spectron,method_options.momentum=0.5")["method_options"]["momentum"] == 0.5
    # The settings' direction is Muon for the dense twin; it is passed over where nothing uses it.
    assert arm("full")["direction"] == arm("lowrank")["direction"] == "orthogonal"
