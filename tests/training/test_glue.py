"""Runs on GLUE: every task and method learns, resumes exactly, and is exported."""

import dataclasses
import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from loro_jax.__main__ import main
from loro_jax.errors import TrainingError
from loro_jax.glue import TASKS, PairTokenizer, TrainBatches, load_data
from loro_jax.layers.adapters import AdapterSpec, adapt
from loro_jax.study.glue_table import read_results, table
from loro_jax.training.glue_inputs import GlueInputs
from loro_jax.training.glue_trained import load_classifier
from loro_jax.training.step import joined, make_program
from models.roberta import read_classifier
from models.roberta.adapters import write_classifier_adapter
from tests.conftest import ROOT
from tests.helpers import run_module
from tests.training import glue_runs, runs
from tests.training.glue_runs import TINY, run

DRAWS_PLOTS = True


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A small random RoBERTa and all tables."""
    folder = tmp_path_factory.mktemp("glue")
    return glue_runs.write_model(folder), glue_runs.write_glue(folder / "tables")


def config_of(settings, given, **changes):
    spec = importlib.util.spec_from_file_location("c", ROOT / "configs" / "roberta_glue.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(settings)
    model, tables = given
    config.init_from, config.data.source = str(model), str(tables)
    for name, value in (TINY | changes).items():
        setattr(config, name, value)
    return config


@pytest.mark.slow
def test_a_run_by_loro_is_exported_and_shown(given, tmp_path, capsys):
    """Regression by adapters and their product."""
    status, output = run(tmp_path / "run", *given, "loro_4_stsb", exact_every=20)
    assert status == 0, output
    assert "has no head: a new one with 1 output(s), from seed 0" in output
    assert "STS-B: 64 training rows, 64 of validation; batches of 16 rows of" in output
    rows = glue_runs.rows(tmp_path / "run")
    evaluations = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [30, 60]
    assert set(evaluations[0]) == {"step", "val_loss", "val_pearson", "val_spearman", "tokens"}
    assert evaluations[-1]["val_pearson"] > 0.9
    assert "STS-B: pearson 0.9" in output
    assert (tmp_path / "run" / "plot.png").stat().st_size > 1000
    # On queries and values factors are trained, and the head; nothing else.
    trained = load_classifier(tmp_path / "run")
    start, _ = read_classifier(given[0], num_labels=1)
    blocks, before = (nnx.to_pure_dict(nnx.state(m.blocks)) for m in (trained.model, start))
    for name in ("query", "value"):
        change = np.asarray(blocks["attention"][name]["W"] - before["attention"][name]["W"])
        # Two products of rank 4: the trained one, and that of the initial factors.
        assert [np.linalg.matrix_rank(one, tol=1e-4) for one in change] == [8, 8]
    np.testing.assert_array_equal(blocks["mlp"]["output"]["W"], before["mlp"]["output"]["W"])
    # The exported model gives the evaluation's metric, in transformers if it is there.
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["problem_type"] == (
        "regression"
    )
    again, notes = read_classifier(tmp_path / "out")
    assert notes == []
    ids = jnp.array([[0, 40, 50, 2, 2, 60, 2]])
    np.testing.assert_allclose(again(ids), trained.model(ids), atol=1e-6)
    capsys.readouterr()
    assert main(["glue", str(tmp_path), "--last"]) == 0
    shown = capsys.readouterr().out
    assert "| method                        | STS-B | average |" in shown
    assert f"| {100 * evaluations[-1]['val_pearson']:.2f} |" in shown
    # What is for language models says so in one line.
    for command in (["generate", "--prompt=a"], ["evaluate", "text.txt"]):
        assert main([command[0], str(tmp_path / "run"), *command[1:]]) == 1
        error = capsys.readouterr().err
        assert "is about GLUE (stsb); expected a language model" in error
        assert error.count("\n") == 1


# Every method, and every way of reading and measuring: other tasks are read as one of these is, and
# have its metric; regression is above.
LEARNS = {
    "full_8_mnli": {"learning_rate": 0.003, "steps": 60},
    "galore_4_mrpc": {"learning_rate": 0.003, "exact_every": 10},
    "lora_8_cola": {"adapter.targets": "all"},
    "sltrain_8_sst2": {"adapter.targets": "all", "adapter.density": 0.05},
    "loro_8_mnli": {"adapter.targets": "all", "exact_every": 10},
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", LEARNS)
def test_every_method_and_task_learns(settings, given, tmp_path):
    status, output = run(tmp_path / "run", *given, settings, **({"steps": 120} | LEARNS[settings]))
    assert status == 0, output
    last = [row for row in glue_runs.rows(tmp_path / "run") if "val_loss" in row][-1]
    name = settings.rpartition("_")[2]
    for metric in TASKS[name].metrics:
        assert last[f"val_{metric}"] > 0.9, last
    assert ("val_accuracy_mismatched" in last) == (name == "mnli")


@pytest.mark.slow
def test_a_run_resumes_exactly(given, tmp_path):
    fields = {"epochs": 3, "steps": 1, "model.hidden_dropout": 0.1, "exact_every": 5}
    status, output = run(tmp_path / "whole", *given, "loro_4_rte", **fields)
    assert status == 0, output
    assert glue_runs.rows(tmp_path / "whole")[-1]["step"] == 12  # 64 rows, 4 batches a pass
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "12")
    status, output = run(tmp_path / "half", *given, "loro_4_rte", **fields)
    assert status == 0, output
    assert f"continuing {tmp_path / 'half'} from step 8" in output
    assert runs.rows(tmp_path / "half") == runs.rows(tmp_path / "whole")
    # A changed table is another run.
    tables = tmp_path / "tables"
    shutil.copytree(given[1], tables)
    text = (tables / "RTE" / "train.tsv").read_text().replace("entailment", "not_entailment", 1)
    (tables / "RTE" / "train.tsv").write_text(text.replace("not_not_", "not_"))
    shutil.rmtree(given[1])
    shutil.copytree(tables, given[1])
    status, output = run(tmp_path / "half", *given, "loro_4_rte", **fields)
    assert status == 1
    assert "fingerprint" in output


@pytest.mark.slow
def test_losses_do_not_depend_on_the_mesh():
    """With dropout, adapters of all projections, micro-batches and exact steps."""
    whole, *others = run_module("tests.training.glue_devices")
    assert len(others) == 2
    for other in others:
        np.testing.assert_allclose(
            other["losses"], whole["losses"], atol=2e-4, err_msg=other["mesh"]
        )
        np.testing.assert_allclose(
            other["logits"], whole["logits"], atol=2e-3, err_msg=other["mesh"]
        )


@pytest.mark.slow
def test_gradients_do_not_depend_on_micro_batches(given):
    """Dropout, too: each row has a key of its own."""
    config = config_of("full_8_rte", given, gradient_accumulation=1)
    config.model.hidden_dropout = 0.3
    inputs = GlueInputs(config)
    batch = jax.tree.map(jnp.asarray, inputs.batch(next(inputs.iterator(range(16)))))
    found = []
    for parts in (1, 4):
        program = make_program(dataclasses.replace(inputs.config, gradient_accumulation=parts))
        state = jax.jit(program.init)()
        found.append(jax.jit(program.loss_and_gradient)(state.params, state.fixed, batch))
    (loss, grads), (again, others) = found
    assert loss == pytest.approx(float(again), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), grads, others)


def test_the_last_batch_of_a_pass_counts_its_rows_alone(given):
    config = config_of("full_8_rte", given, batch_size=24)
    for name in ("hidden_dropout", "attention_dropout"):
        setattr(config.model, name, 0.0)
    inputs = GlueInputs(config)
    iterator = inputs.iterator(range(24))
    *_, rows = (next(iterator) for _ in range(3))  # 64 rows: 24, 24, 16
    assert rows.weights.sum() == 16
    program = make_program(inputs.config)
    state = jax.jit(program.init)()
    # Without dropout, training and evaluation have the same losses.
    loss = jax.jit(lambda: program.loss_and_gradient(state.params, state.fixed, rows)[0])()
    alone = jax.tree.map(lambda x: jnp.asarray(x[:16]), rows)
    losses, logits = jax.jit(program.eval_step)(state.params, state.fixed, alone)
    assert float(loss) == pytest.approx(float(losses.mean()), rel=1e-5)
    assert logits.shape == (16, 2)


def test_a_run_starts_from_the_directory(given):
    """Adapters that are not zero at first change nothing; a stored head stays."""
    config = config_of("loro_4_rte", given)
    inputs = GlueInputs(config)
    program = make_program(inputs.config)
    state, (_, note) = inputs.start(jax.jit(program.init)())
    assert "has no head" in note
    pairs = joined(state.params, state.fixed)["blocks"]["attention"]["query"]
    assert float(jnp.abs(pairs["adapter"]["B"]).min()) > 0
    batch = jax.tree.map(jnp.asarray, next(inputs.iterator(range(16))))
    _, logits = jax.jit(program.eval_step)(state.params, state.fixed, batch)
    model, _ = read_classifier(given[0], num_labels=2)
    wanted = nnx.jit(lambda model: model(batch.ids, mask=batch.mask))(model)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ("loro_4_rte", {"task": "wnli"}, "config.task must be one of cola, sst2, mrpc, stsb"),
        ("loro_4_rte", {"init_from": "nowhere"}, "config.init_from: nowhere is not a directory"),
        ("loro_4_rte", {"data.source": "nowhere"}, "'nowhere' is not a directory; expected that"),
        ("loro_4_rte", {"data.tokenizer": "nowhere"}, "config.data.tokenizer: nowhere can't be"),
        ("loro_4_rte", {"sequence_length": 63}, "sequence_length = 63 is more than the 62 tokens"),
        ("loro_4_rte", {"adapter.targets": "query,q"}, "adapter.targets must be all, or names"),
        ("loro_4_rte", {"adapter.trained": "top"}, "adapter.trained must be names among head,"),
        ("loro_4_rte", {"adapter.rank": 33}, "adapter.rank must be at most 32"),
        ("loro_4_rte", {"adapter.kind": "none"}, "method = 'loro' trains factors, which a pre"),
        ("full_8_rte", {"method": "loro"}, "method = 'loro' trains factors, which a pretrained"),
        ("full_8_rte", {"adapter.kind": "lora"}, "method 'full' does not train such adapters"),
        ("sltrain_8_rte", {"method": "loro"}, "method 'loro' does not train such adapters"),
        ("full_8_rte", {"published_ppl": True}, "published_ppl is for language models"),
        ("full_9", {}, "rank '9': expected one of 4, 8"),
        ("full_8_wnli", {}, "there is no task 'wnli'; expected one of cola,"),
        ("lion_8", {}, "there is no method 'lion'; expected one of loro, lora"),
    ],
)
def test_what_cannot_be_trained_is_an_error_of_one_line(
    settings, changes, message, given, tmp_path
):
    fields = {"init_from": given[0], "data.source": given[1]} | changes
    model, tables = fields.pop("init_from"), fields.pop("data.source")
    status, output = run(tmp_path / "run", model, tables, settings, **fields)
    assert status == 1
    assert message in output
    assert output.count("\n") == 1, output
    assert not (tmp_path / "run").exists()


def test_fields_of_these_runs_are_named_in_others(tmp_path):
    fields = [f"--workdir={tmp_path / 'run'}", "--config.task=cola"]
    status, output = runs.run(*fields)
    assert status == 1
    assert "the config has no field 'task'; it is one of other runs, see --help" in output
    status, output = runs.run(f"{glue_runs.CONFIG}:full", "--config.data.sorce=a")
    assert status == 1
    assert "the config has no field 'sorce'; did you mean config.data.source?" in output


def test_wrong_tables_and_models_leave_nothing_behind(given, tmp_path):
    model, tables = given
    (tmp_path / "tables").mkdir()
    for split in ("train", "dev"):
        path = tmp_path / "tables" / f"{split}.tsv"
        path.write_text("index\tsentence1\tsentence2\tanswer\n0\ta\tb\tentailment\n")
    cases = [(model, tmp_path / "tables", "train.tsv has no column 'label' (the label of RTE)")]
    # A tensor of the model is missing.
    shutil.copytree(model, tmp_path / "damaged")
    stored = load_file(model / "model.safetensors")
    del stored["roberta.encoder.layer.1.output.dense.bias"]
    save_file(stored, tmp_path / "damaged" / "model.safetensors")
    cases += [(tmp_path / "damaged", tables, "layer.1.output.dense.bias is missing")]
    shutil.copytree(model, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    cases += [(tmp_path / "bare", tables, "tokenizer.json can't be read (No such file")]
    for source, data, message in cases:
        status, output = run(tmp_path / "run", source, data, "full_8_rte")
        assert status == 1
        assert message in output
        assert output.count("\n") == 1, output
        assert not (tmp_path / "run").exists()


def test_steps_follow_from_passes(given):
    inputs = GlueInputs(config_of("loro_4_rte", given, epochs=3, steps=1))
    config = inputs.config
    assert (config.steps, config.eval_every, config.checkpoint_every) == (12, 4, 4)
    assert inputs.fingerprint == GlueInputs(config_of("full_8_rte", given)).fingerprint


def test_new_weights_without_a_directory(given):
    config = config_of("full_8_cola", given, init_from=None, sequence_length=40)
    config.data.tokenizer = str(given[0])
    config.model = dataclasses.replace(
        config.model, vocab_size=0, hidden_size=32, num_layers=1, num_heads=2, pad_id=0
    )
    made = GlueInputs(config).config.model
    assert (made.pad_id, made.num_labels) == (1, 2)
    assert made.vocab_size == PairTokenizer(str(given[0])).vocab_size


def test_the_table_has_the_form_of_the_papers(given, tmp_path):
    def write(name, settings, metrics, **changes):
        config = config_of(settings, given, steps=20, **changes)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(config.to_json())
        lines = [json.dumps({"step": 10 * i + 10, **row}) for i, row in enumerate(metrics)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    write("a", "loro_4_cola", [{"val_matthews": 0.6}, {"val_matthews": 0.5}])
    write("b", "loro_4_cola", [{"val_matthews": 0.7}, {"val_matthews": 0.4}], seed=1)
    write("c", "loro_4_cola", [{"val_matthews": 0.1}], learning_rate=1.0)
    write("d", "loro_4_mrpc", [{"val_f1": 0.9, "val_accuracy": 0.8}])
    write("e", "galore_8_cola", [{"val_matthews": 0.55}])
    results = read_results([tmp_path])
    assert table(results) == [
        {
            "method": "loro, lora r=4 on query,value",
            "CoLA": "65.00",
            "MRPC": "90.00",
            "average": "77.50",
        },
        {"method": "galore r=8", "CoLA": "55.00", "MRPC": "", "average": ""},
    ]
    assert table(results, "last")[0]["CoLA"] == "45.00"


def test_every_setting_of_the_config_is_valid(given):
    for method in ("loro", "lora", "galore", "sltrain", "full"):
        for rank in (4, 8):
            for task in TASKS:
                config = config_of(f"{method}_{rank}_{task}", given)
                config.sequence_length = 512
                config.validate()
                assert config.model.rank == rank
                assert config.task == task
    assert config_of("loro", given).task == "cola"
    assert config_of("full_mrpc", given).task == "mrpc"


def test_data_are_read_once_for_all_processes(given):
    """Two processes hold the two halves of a batch."""
    task = TASKS["rte"]
    config = config_of("full_8_rte", given)
    data = load_data(config.data, task, PairTokenizer(str(given[0])), 48)
    halves = [next(TrainBatches(data, 16, 0, rows)) for rows in (range(8), range(8, 16))]
    whole = next(GlueInputs(config).iterator(range(16)))
    for name in whole._fields:
        both = np.concatenate([getattr(half, name) for half in halves])
        np.testing.assert_array_equal(both, getattr(whole, name))


@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ("lora_4_mnli", {"adapter.targets": "query,value,output"}),
        # Its adapters begin with a product that is not zero.
        ("loro_4_mnli", {"adapter.targets": "all", "exact_every": 5}),
    ],
)
def test_peft_reads_the_exported_adapters(settings, changes, given, tmp_path):
    peft = pytest.importorskip("peft", reason="the counterpart needs peft")
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    status, output = run(tmp_path / "run", *given, settings, steps=6, eval_every=6, **changes)
    assert status == 0, output
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--adapter"]) == 0
    base = transformers.AutoModelForSequenceClassification.from_pretrained(given[0], num_labels=3)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    ids = np.array([[0, 40, 50, 2, 2, 60, 2], [0, 7, 9, 11, 13, 15, 2]])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(
        load_classifier(tmp_path / "run").model(jnp.asarray(ids)), expected, atol=1e-4
    )
    # As PEFT writes it: the same names.
    theirs.save_pretrained(tmp_path / "theirs")
    names = [
        set(load_file(tmp_path / folder / "adapter_model.safetensors"))
        for folder in ("out", "theirs")
    ]
    assert names[0] == names[1]


def loaded_logits(given, adapter):
    """Logits of a batch at the start of a run from an adapter, the batch, and what is said."""
    config = config_of("lora_8_rte", given)
    config.adapter = dataclasses.replace(config.adapter, init_from=str(adapter))
    inputs = GlueInputs(config)
    program = make_program(inputs.config)
    state, notes = inputs.start(jax.jit(program.init)())
    batch = jax.tree.map(jnp.asarray, next(inputs.iterator(range(16))))
    _, logits = jax.jit(program.eval_step)(state.params, state.fixed, batch)
    return inputs.config, logits, batch, notes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers
def test_a_run_starts_from_adapters_of_peft(given, tmp_path):
    peft = pytest.importorskip("peft", reason="the counterpart needs peft")
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(given[0], num_labels=2)
    lora = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        init_lora_weights=False,
        target_modules=["query", "intermediate.dense", "attention.output.dense"],
        task_type="SEQ_CLS",
    )
    theirs = peft.get_peft_model(base, lora).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    config, logits, batch, notes = loaded_logits(given, tmp_path / "theirs")
    assert (config.adapter.rank, config.adapter.names) == (
        3,
        ("query", "attention.output", "intermediate"),
    )
    assert not any("has no head" in note for note in notes)
    with torch.no_grad():
        expected = theirs(
            torch.tensor(np.array(batch.ids)),
            attention_mask=torch.tensor(np.array(batch.mask, np.int64)),
        ).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_run_continues_adapters_that_were_exported(given, tmp_path):
    model, _ = read_classifier(given[0], num_labels=2)
    spec = AdapterSpec(rank=3, alpha=6, initialiser="xavier")
    adapted = adapt(model, spec, where=["blocks/mlp/output"], trained=["classifier"])
    write_classifier_adapter(adapted, tmp_path / "out", base=str(given[0]))
    config, logits, batch, notes = loaded_logits(given, tmp_path / "out")
    assert (config.adapter.alpha, config.adapter.names) == (6, ("output",))
    assert notes[-1] == f"with the adapters of {tmp_path / 'out'}"
    # Without what is subtracted from W at the start, adapters of such factors change it.
    adapted.blocks.mlp.output.base.W[...] = model.blocks.mlp.output.W[...]
    wanted = nnx.jit(lambda model: model(batch.ids, mask=batch.mask))(adapted)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    for changes, message in (
        ({"peft_type": "MISS"}, "expected LORA"),
        ({"modules_to_save": ["embeddings"]}, "modules_to_save = .* is not supported"),
        ({"r": 4}, r"has shape \(3, 48\); expected \(4, 48\)"),
        ({"layers_to_transform": [0], "target_modules": ["output.dense"]}, "in 1 of 2 layers"),
        ({"target_modules": ["dense_1"]}, "matches no projection"),
        ({"modules_to_save": None}, "classifier.dense.bias is not expected"),
    ):
        content = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        (tmp_path / "bad").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "out" / "adapter_model.safetensors", tmp_path / "bad")
        (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(content | changes))
        with pytest.raises(TrainingError, match=message):
            loaded_logits(given, tmp_path / "bad")
