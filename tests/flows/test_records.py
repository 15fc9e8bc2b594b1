"""Records of runs: what is written, read back, and made into times and estimates."""

import json
import re

import pytest
from markdown_it import MarkdownIt

from selfcascade import traffic
from selfcascade.settings import SettingsError
from selfcascade.traffic import Traffic
from selfcascade_flows.configuration import load
from selfcascade_flows.outlook import Step
from selfcascade_flows.rates import SECONDS, seconds_of
from selfcascade_flows.variants import sampled_with, trainings, variant, variants
from selfcascade_tasks.record import RunRecord, StageCost, UnitCost, earlier_costs, recorded
from selfcascade_tasks.summary import page_of, rows_of

UNIT = UnitCost(unit=0, work=10, seconds=5.0, cpu_seconds=4.0, peak_bytes=1000)


def step(**changes):
    return Step(**({"stage": "generate", "name": "demo-base", "units": 4, "done": 0, "work": 128.0, "method": "base"} | changes))


def test_a_stage_is_recorded_with_its_units_also_when_it_fails(store):
    traffic.take()
    with recorded(store, "curate", "fine") as cost:
        cost.artifact, cost.units = "datasets/fine@0", 2
        cost.add(UNIT)
        cost.add(UNIT.model_copy(update={"peak_bytes": 3000, "traffic": Traffic(requests=2, sent=2**21)}))
    with pytest.raises(ValueError, match="boom"), recorded(store, "adapt", "failed"):
        raise ValueError("boom")
    [info] = list(store.list("runs/"))
    record = RunRecord.model_validate_json(store.read(info.key))
    fine, failed = record.stages
    assert (fine.done, fine.work, fine.unit_seconds, fine.peak_bytes) == (2, 20, 10.0, 3000)
    assert (fine.traffic.sent, fine.traffic.requests) == (2**21, 2)
    assert (failed.stage, failed.done, failed.error, failed.state, fine.state) == ("adapt", 0, "ValueError: boom", "failed", "done")
    assert record.host["python"]


def test_a_summary_says_what_was_done_skipped_and_failed():
    """Seconds, work a second, memory and cost of what was done; where the output is, or why there is none."""
    moved = Traffic(sent=3 << 20, received=1 << 19)
    stages = [
        StageCost(stage="curate", name="a", artifact="datasets/a@1", units=3, seconds=0.2),
        StageCost(stage="generate", name="b", artifact="samples/b@2", units=4, done=3, seconds=1800.0, work=900.0, peak_bytes=2**30, traffic=moved),
        StageCost(stage="evaluate", name="c", artifact="reports/c@3", units=2, done=1, seconds=3600.0, work=1.0, error="StoreFull: no room"),
        StageCost(stage="adapt", name="d", units=10, seconds=1.0, error="KeyboardInterrupt:"),
    ]
    rows = rows_of(RunRecord(run="r", started="now", stages=stages), price=2.5)
    assert [row["state"] for row in rows] == ["skipped", "done", "failed", "failed"]
    assert [row["units"] for row in rows] == ["3 before", "3 of 4 now", "1 of 2 now", "0 of 10 now"]
    assert [row["cost"] for row in rows] == ["0.0001", "1.2500", "2.5000", "0.0007"]
    assert (rows[1]["a second"], rows[1]["peak MiB"], rows[1]["MiB up"], rows[1]["MiB down"]) == ("0.50", "1,024", "3.0", "0.5")
    assert [row["output or error"] for row in rows] == ["datasets/a@1", "samples/b@2", "StoreFull: no room", "KeyboardInterrupt:"]
    published = StageCost(stage="evaluate", name="c", artifact="reports/c@4", units=2, seconds=9.0, made=True)
    assert (published.state, rows_of(RunRecord(run="r", started="now", stages=[published]), price=0)[0]["units"]) == ("done", "0 of 2 now")
    page = page_of(RunRecord(run="r", started="now", stages=stages), price=2.5)
    html = MarkdownIt("commonmark").enable("table").render(page)
    assert html.startswith("<p><strong>1 done, 1 skipped, 2 failed</strong> in 5,401 s, at a cost of 3.7508</p>")
    first, second = html.split("<table>")[1:]
    assert re.findall("<td.*?>(.*)</td>", first)[4:8] == ["generate b", "done", "3 of 4 now", "samples/b@2"]
    assert re.findall("<td.*?>(.*)</td>", second)[7:14] == ["generate b", "1,800", "0.50", "1,024", "3.0", "0.5", "1.2500"]
    assert "<strong>failed</strong>" in first
    assert "cost" not in rows_of(RunRecord(run="r", started="now", stages=stages), price=0)[0]


def test_records_of_another_form_are_passed_over(store):
    store.put_cache("runs/old.json", b'{"run": 1}')
    store.put_cache("runs/torn.json", b"{")
    store.put_cache("runs/page.html", b"<html>")
    good = RunRecord(run="good", started="now", stages=[StageCost(stage="curate", name="x")])
    store.put_cache(good.key, good.model_dump_json().encode())
    assert [cost.name for cost in earlier_costs(store)] == ["x"]


def test_an_estimate_follows_the_newest_record_of_that_name():
    run = load("demo")
    costs = [
        StageCost(stage="generate", method="base", name="other", done=1, work=1, unit_seconds=99),
        StageCost(stage="generate", method="base", name="demo-base", done=2, work=64, unit_seconds=32),
        StageCost(stage="generate", method="base", name="demo-base", done=2, work=64, unit_seconds=999),
    ]
    assert seconds_of(step(), run, costs) == pytest.approx(128 * 0.5 / run.execution.workers)
    assert seconds_of(step(done=3, work=32.0), run, costs) == pytest.approx(32 * 0.5)
    assert seconds_of(step(serial=True), run, costs) == pytest.approx(128 * 0.5)
    assert seconds_of(step(published=True), run, costs) == 0


def test_without_a_record_the_measured_rate_serves_the_shipped_base_alone():
    assert seconds_of(step(), load("demo"), []) == pytest.approx(128 * SECONDS["generate", "base"] / 2)
    assert seconds_of(step(), load("sdxl-2048"), []) is None


def test_samples_are_named_after_run_and_method():
    run = load("demo")
    found = variants(run)
    assert list(found) == ["base", "lanczos", "direct eta 0", "direct eta 1", "tuning-free", "tuned"]
    assert {sampling.name for sampling in found.values()} >= {"demo-base", "demo-direct-eta-0", "demo-tuned"}
    assert found["direct eta 1"].cascade.eta == 1
    assert found["tuned"].upsampler == "upsamplers/demo"
    assert found["tuning-free"].upsampler is None
    assert variant(run, "direct") == found["direct eta 0"]


def test_two_bases_in_one_run_are_refused():
    with pytest.raises(SettingsError, match="set both to one base"):
        variants(load("demo", ["generation.base=other"]))


def test_a_run_that_trains_no_upsampler_cannot_sample_tuned():
    with pytest.raises(SettingsError, match=r"method 'tuned' needs an upsampler but adaptation\.trainable is 'latent-upscaler'; set it to 'upsampler'"):
        variants(load("demo", ["adaptation.trainable=latent-upscaler"]))
    assert "tuned" not in variants(load("demo", ["adaptation.trainable=latent-upscaler", "methods=[base, tuning-free]"]))


def test_a_run_trains_what_its_methods_need():
    """Each tuned baseline once, from the run's own adaptation but for what it says itself; the samples name what was trained for them."""
    assert list(trainings(load("demo"))) == ["upsamplers/demo"]
    run = load("demo", ["methods=[base, lora, full, tuned]", "adaptation.seed=7"])
    trained, found = trainings(run), variants(run)
    assert list(found) == ["base", "lora rank 4", "lora rank 32", "full", "tuned"]
    assert list(trained) == ["upsamplers/demo", "adapters/demo-lora-rank-4", "adapters/demo-lora-rank-32", "unets/demo-full"]
    assert trained["upsamplers/demo"] == run.adaptation
    for label, name, kind, rank in (
        ("lora rank 4", "lora-rank-4", "adapters", 4),
        ("lora rank 32", "lora-rank-32", "adapters", 32),
        ("full", "full", "unets", 4),
    ):
        training, sampling = trained[f"{kind}/demo-{name}"], found[label]
        assert (training.trainable, training.rank, training.name) == (sampling.method, rank, f"demo-{name}")
        assert (sampling.name, sampling.finetuned, sampling.upsampler) == (f"demo-{name}", f"{kind}/demo-{name}", None)
        own = {"trainable", "rank", "name", "lr"}
        assert training.model_dump(exclude=own) == run.adaptation.model_dump(exclude=own)
        assert sampled_with(sampling, {f"{kind}/demo-{name}": "x/y@1", "upsamplers/demo": "x/z@1"}).finetuned == "x/y@1"
    assert sampled_with(found["tuned"], {"upsamplers/demo": "upsamplers/demo@1"}).upsampler == "upsamplers/demo@1"
    assert sampled_with(found["base"], {"upsamplers/demo": "upsamplers/demo@1"}) == found["base"]
    assert variant(run, "lora").finetuned == "adapters/demo"
    assert variant(load("demo", ["generation.method=full", "generation.finetuned=here"]), "full").finetuned == "here"
    with pytest.raises(SettingsError, match="methods hold 'full' but finetunes have none of that way; add one, or leave 'full' out of methods"):
        variants(load("demo", ["methods=[base, full]", "finetunes=[{rank: 4}]"]))
    with pytest.raises(SettingsError, match="finetunes hold lora rank 4 twice; give each a rank of its own"):
        load("demo", ["finetunes=[{rank: 4}, {rank: 4, steps: 9}]"])


def rows(*given: tuple[str, dict[str, object]]) -> list[str]:
    """The override that gives a run these rows."""
    return ["rows=" + json.dumps([{"label": label, "changes": changes} for label, changes in given])]


TUNED_C = {"generation.method": "tuned", "adaptation.upsampler.variant": "C"}


def test_a_row_is_the_run_with_some_settings_changed_and_what_it_needs_is_trained_once():
    run = load(
        "demo",
        rows(
            ("fewer steps", {"generation.cascade.later_steps": 15}),
            ("K 0.3", {"generation.method": "tuned", "generation.cascade.start": 0.3}),
            ("tuned C", TUNED_C),
            ("C at 0.3", TUNED_C | {"generation.cascade.start": 0.3}),
            ("latent SR", {"generation.method": "latent-sr", "adaptation.trainable": "latent-upscaler"}),
            ("LoRA", {"generation.method": "lora", "adaptation.trainable": "lora", "adaptation.rank": 8}),
            ("theirs", {"generation.method": "tuned", "generation.upsampler": "upsamplers/theirs"}),
        ),
    )
    found, trained = variants(run), trainings(run)
    assert list(found) == [*variants(load("demo")), "fewer steps", "K 0.3", "tuned C", "C at 0.3", "latent SR", "LoRA", "theirs"]
    assert (found["fewer steps"].name, found["fewer steps"].method, found["fewer steps"].cascade.later_steps) == ("demo-fewer-steps", "tuning-free", 15)
    # What is as the run trains it anyway is not trained again, nor what two rows share.
    assert (found["K 0.3"].upsampler, found["K 0.3"].cascade.start) == ("upsamplers/demo", 0.3)
    assert found["tuned C"].upsampler == found["C at 0.3"].upsampler == "upsamplers/demo-tuned-c"
    assert (found["latent SR"].upscaler, found["LoRA"].finetuned) == ("upscalers/demo-latent-sr", "adapters/demo-lora")
    assert list(trained) == ["upsamplers/demo", "upsamplers/demo-tuned-c", "upscalers/demo-latent-sr", "adapters/demo-lora"]
    assert trained["upsamplers/demo"] == run.adaptation
    variant_c = run.adaptation.upsampler.model_copy(update={"variant": "C"})
    assert trained["upsamplers/demo-tuned-c"] == run.adaptation.model_copy(update={"name": "demo-tuned-c", "upsampler": variant_c})
    assert trained["adapters/demo-lora"].rank == 8
    # The run itself is untouched by its rows.
    assert {label: found[label] for label in variants(load("demo"))} == variants(load("demo"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a", {"generation.methud": "tuned"}), r"row 'a': generation: methud is not a setting$"),
        (("a", {"generation.cascade.start": 2}), r"row 'a': generation: cascade\.start: .*less than or equal to 1"),
        (("a", {"generation.method.x": 1}), r"row 'a': generation: method\.x: 'method' is a value, not a group of settings$"),
        (("a", {"evaluation.seed": 1}), r"a row cannot change evaluation\.seed; it changes keys of generation and adaptation"),
        (("a", {"generation.prompts.count": 1}), r"a row cannot change generation\.prompts\.count"),
        (("a", {}), r"rows\.0\.changes: "),
        (("a|b", {"generation.seed": 1}), r"rows\.0\.label: "),
        (("a", TUNED_C | {"adaptation.trainable": "lora"}), r"row 'a' needs adaptation\.trainable 'upsampler', not 'lora'; add it to its changes$"),
        (("Tuned", {"generation.seed": 1}), r"rows hold 'Tuned', but another row's samples are called demo-tuned already; give it another label$"),
    ],
)
def test_a_row_that_cannot_be_is_refused_in_one_line(row, message):
    with pytest.raises(SettingsError, match=message) as refused:
        variants(load("demo", rows(row)))
    assert "\n" not in str(refused.value)


def test_two_rows_of_one_label_are_refused():
    with pytest.raises(SettingsError, match="rows hold a twice; give each a label of its own"):
        load("demo", rows(("a", {"generation.seed": 1}), ("a", {"generation.seed": 2})))
