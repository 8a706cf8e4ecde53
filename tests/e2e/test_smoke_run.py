"""A finished run of the scenario `smoke`: the files that it leaves, and what they prove."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from umbel_client.data.records import load_records
from umbel_client.ledger.ledger import Ledger
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.site.config import load_config
from umbel_client.tasks.prepared import prepare
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.tasks.task import ClassificationTask
from umbel_common.adapters.vector import adapter_digest, flatten
from umbel_common.canonical import decode_canonical, encode
from umbel_common.errors import VerificationError
from umbel_common.plans.plan import PLAN_VERSIONS, TrainingPlan
from umbel_common.plans.statements import RELEASE_VERSIONS
from umbel_common.protocol.transcript import (
    GENESIS,
    Entry,
    JobFinished,
    RoundReleased,
    TranscriptEvent,
    append,
)
from umbel_common.trust.identity import Identity, Signed, sign
from umbel_host.files.adapter_folder import RELEASE_FILE, read_vector, write_vector
from umbel_host.files.keys import read_identity
from umbel_server.storage.registry import Registry
from umbel_simulations.inputs.base_model import model_folder
from umbel_simulations.runs import verify
from umbel_simulations.runs.verify import verify_run
from umbel_simulations.scenario.file import find_scenario
from umbel_simulations.scenario.run_folder import read_signed, write_signed

Simulate = Callable[..., Any]

TEXTS = ["acute appendicitis with peritonitis", "open-angle glaucoma", "iron deficiency anaemia"]


def plan_of(run: Path) -> TrainingPlan:
    signed = decode_canonical((run / "plan.msgpack").read_bytes(), Signed)
    return decode_canonical(signed.statement, PLAN_VERSIONS)


def test_a_run_leaves_everything_that_the_readme_names(smoke_run: Path) -> None:
    for name in (
        "scenario.json",
        "roster.json",
        "plan.json",
        "plan.msgpack",
        "headers.jsonl",
        "transcript.jsonl",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "adapter/tokenizer.json",
        "adapter/README.md",
    ):
        assert (smoke_run / name).stat().st_size > 0, name


def test_plain_peft_loads_the_adapter_and_gives_the_logits_of_umbel(smoke_run: Path) -> None:
    plan = plan_of(smoke_run)
    base = model_folder(find_scenario("smoke").model)
    adapter = smoke_run / "adapter"
    # As the adapter's own card says, with nothing of Umbel.
    task = json.loads((adapter / "task.json").read_text())
    head = load_file(adapter / "head.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter).eval()
    batch = tokenizer(
        TEXTS, truncation=True, max_length=task["max_tokens"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        tokens = plain(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled = torch.nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)
        expected = task["logit_scale"] * pooled @ head["weight"].T + head["bias"]

    ours = AdaptedModel.load(base, plan)
    ours.set_vector(read_vector(adapter, plan))
    records = load_records(write_records(smoke_run.parent / "texts.jsonl", plan), plan.task)
    data = prepare(ours, base, records, BatchLimit(8), cache=None)
    with torch.no_grad():
        logits = ours.logits(
            ClassificationTask().batch(data, data.part(np.arange(len(TEXTS)))).inputs
        )
    # The frozen layers' outputs are kept as float16.
    assert torch.allclose(logits, expected, atol=2e-2)
    # Two logits that are closer than that may change places.
    first, second = expected.topk(2).values.T
    clear = first - second > 4e-2
    assert (logits.argmax(-1) == expected.argmax(-1))[clear].all()
    # The adapter does something: without it the logits differ.
    with torch.no_grad(), plain.disable_adapter():
        bare = plain(**batch).last_hidden_state
    assert (bare - tokens).abs().max() > 1e-3


def write_records(path: Path, plan: TrainingPlan) -> Path:
    rows = [json.dumps({"text": text, "label": plan.task.labels[0]}) for text in TEXTS]
    path.write_text("\n".join(rows))
    return path


def test_what_left_a_site_is_masked_and_nothing_is_in_clear(smoke_run: Path) -> None:
    summary = json.loads((smoke_run / "summary.json").read_text())
    plan = plan_of(smoke_run)
    trained = sum(tensor.size for tensor in plan.trained_tensors(1))
    for site in summary["sites"]:
        assert site["sent_clear_bytes"] == 0
        assert site["sent_masked_bytes"] == plan.training.rounds * 4 * (trained + 1)
        assert site["sent_protocol_bytes"] < 0.1 * site["sent_masked_bytes"]


def test_the_ledger_of_each_site_holds_what_the_summary_says(smoke_run: Path) -> None:
    summary = json.loads((smoke_run / "summary.json").read_text())
    plan = plan_of(smoke_run)
    for site in summary["sites"]:
        config = load_config(smoke_run / "sites" / site["name"] / "client.toml")
        records = load_records(Path(config.data.path), plan.task)
        with Ledger.open(Path(config.state) / "ledger.sqlite", records.digest()) as ledger:
            assert len(ledger.history()) == plan.training.rounds
            assert ledger.spent(1e-5) == pytest.approx(site["epsilon"])
            assert 0.99 * 8.0 < ledger.spent(1e-5) <= 8.0


def test_every_site_holds_the_same_adapter(smoke_run: Path) -> None:
    plan = plan_of(smoke_run)
    vectors = [
        read_vector(site / "state" / "adapters" / plan.job, plan)
        for site in (smoke_run / "sites").iterdir()
    ]
    assert len(vectors) == 3
    assert all(np.array_equal(vector, vectors[0]) for vector in vectors)
    assert np.array_equal(read_vector(smoke_run / "adapter", plan), vectors[0])


def test_private_files_are_private(smoke_run: Path) -> None:
    for site in (smoke_run / "sites").iterdir():
        assert (site / "identity.pem").stat().st_mode & 0o077 == 0
        assert (site / "state").stat().st_mode & 0o077 == 0
        assert (site / "state" / "session.sqlite").stat().st_mode & 0o077 == 0


def test_verify_confirms_the_run(simulate: Simulate, smoke_run: Path) -> None:
    result = simulate("verify", smoke_run)
    assert result.returncode == 0, result.stderr
    assert "2 rounds released, 0 attempts aborted" in result.stdout


def copy_of(run: Path, folder: Path) -> Path:
    """A copy of what a run shows to others."""
    copy = folder / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("sites", "server", "public"))
    return copy


def cut_transcript(run: Path) -> None:
    lines = (run / "transcript.jsonl").read_bytes().splitlines()
    (run / "transcript.jsonl").write_bytes(b"\n".join(lines[:1] + lines[2:]) + b"\n")


def forge_transcript(run: Path) -> None:
    lines = (run / "transcript.jsonl").read_text().splitlines()
    entry = json.loads(lines[1])
    entry["signature"] = json.loads(lines[2])["signature"]
    lines[1] = json.dumps(entry)
    (run / "transcript.jsonl").write_text("\n".join(lines) + "\n")


def change_adapter(run: Path) -> None:
    path = run / "adapter" / "head.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_roster(run: Path) -> None:
    path = run / "roster.json"
    roster = json.loads(path.read_text())
    members = roster["members"]
    first, second = (members if isinstance(members, list) else list(members.values()))[:2]
    key = "public_key"
    first[key], second[key] = second[key], first[key]
    path.write_text(json.dumps(roster))


def drop_header(run: Path) -> None:
    lines = (run / "headers.jsonl").read_bytes().splitlines()
    (run / "headers.jsonl").write_bytes(lines[0] + b"\n")


@pytest.mark.parametrize(
    "tamper",
    [cut_transcript, forge_transcript, change_adapter, change_roster, drop_header],
)
def test_verify_notices_every_tampering(
    simulate: Simulate, smoke_run: Path, tmp_path: Path, tamper: Callable[[Path], None]
) -> None:
    copy = copy_of(smoke_run, tmp_path)
    tamper(copy)
    result = simulate("verify", copy)
    assert result.returncode == 52, result.stdout
    assert result.stderr.startswith("error: ")


def changed_setting(name: str, **fields: object) -> Callable[[Path], Path]:
    def change(run: Path) -> Path:
        path = run / "adapter" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return path

    return change


def further_weights(run: Path) -> Path:
    path = run / "adapter" / "adapter_model.bin"
    path.write_bytes(b"a pickle")
    return path


@pytest.mark.parametrize(
    "change",
    [
        changed_setting("adapter_config.json", lora_alpha=1600),
        changed_setting("adapter_config.json", base_model_name_or_path="another"),
        changed_setting("task.json", labels=["b", "a"]),
        changed_setting("plan.json", plan={}),
        further_weights,
    ],
)
def test_the_adapter_that_was_verified_is_the_one_that_others_load(
    smoke_run: Path, tmp_path: Path, change: Callable[[Path], Path]
) -> None:
    """Its tensors are as they were; what says how to use them is not."""
    copy = copy_of(smoke_run, tmp_path)
    verify_run(copy)
    path = change(copy)
    with pytest.raises(VerificationError) as refusal:
        verify_run(copy)
    assert refusal.value.file == path


Summary = dict[str, Any]

CHANGED_FIGURES: dict[str, Callable[[Summary], Any]] = {
    "transcript_head": lambda summary: summary.update(transcript_head="00" * 32),
    "adapter_digest": lambda summary: summary.update(adapter_digest="00" * 32),
    "aborted_attempts": lambda summary: summary.update(aborted_attempts=7),
    "model": lambda summary: summary.update(model="another"),
    "method": lambda summary: summary.update(method="alternate"),
    "privacy": lambda summary: summary.update(privacy="none"),
    "rounds": lambda summary: summary.update(rounds=1),
    "local_steps": lambda summary: summary.update(local_steps=1),
    "trained_parameters": lambda summary: summary.update(trained_parameters=1),
    "curve": lambda summary: summary["curve"].pop(1),
    "sites": lambda summary: summary["sites"].pop(),
    "epsilon": lambda summary: summary["sites"][0].update(epsilon=9.0),
    "epsilon below zero": lambda summary: summary["sites"][0].update(epsilon=-1.0),
    "epsilon of a round": lambda summary: summary["curve"][1]["epsilon"].update(extra=9.0),
    "delta": lambda summary: summary["sites"][0].update(delta=1e-9),
    "a smaller epsilon": lambda summary: summary["sites"][0].update(epsilon=0.01),
    "no epsilon": lambda summary: summary["sites"][0].update(epsilon=None),
    "an epsilon that falls": lambda summary: summary["curve"][0]["epsilon"].update(
        dict.fromkeys(summary["curve"][0]["epsilon"], 7.5)
    ),
    "no noise": lambda summary: summary["sites"][0].update(noise_multiplier=None),
    "noise below zero": lambda summary: summary["sites"][0].update(noise_multiplier=-3.0),
    "more noise": lambda summary: summary["sites"][0].update(
        noise_multiplier=1.05 * summary["sites"][0]["noise_multiplier"]
    ),
    "less noise": lambda summary: summary["sites"][0].update(
        noise_multiplier=0.95 * summary["sites"][0]["noise_multiplier"]
    ),
    "a smaller sampling rate": lambda summary: summary["sites"][0].update(
        sampling_rate=0.5 * summary["sites"][0]["sampling_rate"]
    ),
    "twice the records": lambda summary: summary["sites"][0].update(
        records=2 * summary["sites"][0]["records"]
    ),
    "fewer records than units": lambda summary: summary["sites"][0].update(
        units=summary["sites"][0]["records"], records=summary["sites"][0]["records"] // 2
    ),
    "a tenth less epsilon": lambda summary: summary["sites"][0].update(epsilon=7.2),
    "a sampling rate above 1": lambda summary: summary["sites"][0].update(sampling_rate=5.0),
    "records below zero": lambda summary: summary["sites"][0].update(records=-5),
    "bytes below zero": lambda summary: summary["sites"][0].update(sent_clear_bytes=-5),
}


@pytest.mark.parametrize("figure", CHANGED_FIGURES)
def test_verify_recomputes_the_figures_of_a_summary(
    smoke_run: Path, tmp_path: Path, figure: str
) -> None:
    copy = copy_of(smoke_run, tmp_path)
    verify_run(copy)
    path = copy / "summary.json"
    summary = json.loads(path.read_text())
    CHANGED_FIGURES[figure](summary)
    path.write_text(json.dumps(summary))
    with pytest.raises(VerificationError) as refusal:
        verify_run(copy)
    assert refusal.value.file == path


def plant_adapter(run: Path, operator: Identity, by: float) -> None:
    """Moves a trained value of the last adapter, and signs a history and a release for it."""
    plan = plan_of(run)
    vector = read_vector(run / "adapter", plan)
    vector[-1] += np.float32(by)
    adapter = adapter_digest(plan.digest(), vector)
    write_vector(run / "adapter", plan, vector)
    events: list[TranscriptEvent] = []
    for signed in read_signed(run / "transcript.jsonl"):
        match decode_canonical(signed.statement, Entry).event:
            case RoundReleased() as event if len(events) == plan.training.rounds:
                release = decode_canonical(event.release.statement, RELEASE_VERSIONS)
                release = msgspec.structs.replace(release, adapter=adapter)
                (run / "adapter" / RELEASE_FILE).write_bytes(encode(sign(operator, release)))
                events.append(msgspec.structs.replace(event, release=sign(operator, release)))
            case JobFinished() as event:
                events.append(msgspec.structs.replace(event, release=adapter))
            case event:
                events.append(event)
    head, entries = GENESIS, []
    for index, event in enumerate(events):
        head, entry = append(operator, index, head, event)
        entries.append(entry)
    write_signed(run / "transcript.jsonl", entries)
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"transcript_head": head.hex(), "adapter_digest": adapter.hex()}
    (run / "summary.json").write_text(json.dumps(summary))


def test_verify_refuses_an_adapter_that_the_operator_planted(
    smoke_run: Path, tmp_path: Path
) -> None:
    """The operator signs whatever it likes; only the plan bounds its last adapter."""
    copy = copy_of(smoke_run, tmp_path)
    operator = read_identity(smoke_run / "server" / "identity.pem")
    bound = plan_of(copy).training.rounds * plan_of(copy).aggregation.largest_change
    plant_adapter(copy, operator, by=1e-4 * bound)
    verify_run(copy)
    plant_adapter(copy, operator, by=2.1 * bound)
    with pytest.raises(VerificationError, match="further from its initial value"):
        verify_run(copy)


def cut_history(run: Path, registry: Path) -> None:
    """Leaves the last round out of a run, with everything that would show it."""
    plan, kept = plan_of(run), read_signed(run / "transcript.jsonl")[:-2]
    write_signed(run / "transcript.jsonl", kept)
    (*_, last) = (decode_canonical(signed.statement, Entry) for signed in kept)
    assert isinstance(last.event, RoundReleased)
    release = decode_canonical(last.event.release.statement, RELEASE_VERSIONS)
    write_vector(run / "adapter", plan, Registry(registry).load(plan, release.adapter))
    (run / "adapter" / RELEASE_FILE).write_bytes(encode(last.event.release))
    summary = json.loads((run / "summary.json").read_text())
    del summary["curve"][-1]
    summary |= {"transcript_head": last.digest().hex(), "adapter_digest": release.adapter.hex()}
    (run / "summary.json").write_text(json.dumps(summary))


def test_verify_refuses_a_run_without_its_last_round(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every signature is genuine, and the summary still says how many rounds the plan has."""
    copy = copy_of(smoke_run, tmp_path)
    cut_history(copy, smoke_run / "server" / "registry")
    require = verify._require
    with monkeypatch.context() as patch:
        patch.setattr(
            verify,
            "_require",
            lambda holds, file, what: require(holds or "ended" in what, file, what),
        )
        verify_run(copy)
    with pytest.raises(VerificationError, match="has not ended"):
        verify_run(copy)


def with_sums(run: Path, folder: Path) -> Path:
    """A copy with the operator's registry."""
    copy = copy_of(run, folder)
    shutil.copytree(run / "server" / "registry", copy / "server" / "registry")
    return copy


def test_verify_makes_each_adapter_again_from_the_sum_of_its_round(
    simulate: Simulate, smoke_run: Path, tmp_path: Path
) -> None:
    copy = with_sums(smoke_run, tmp_path)
    assert verify_run(copy).not_recomputed == ()
    assert "their sums" not in simulate("verify", copy).stdout
    first, *_ = verify_run(copy).releases[1:]
    path = copy / "server" / "registry" / "sums" / first.sum.hex()
    total = path.read_bytes()
    path.write_bytes(total[:-1] + bytes([total[-1] ^ 1]))
    with pytest.raises(VerificationError, match="its sum is not the one it names"):
        verify_run(copy)
    path.unlink()
    assert verify_run(copy).not_recomputed == (1, 2)
    assert "not all at hand: rounds 1, 2\n" in simulate("verify", copy).stdout
    # Nothing of the operator's files is needed for the rest.
    shutil.rmtree(copy / "server")
    assert verify_run(copy).not_recomputed == (1, 2)


def test_the_name_of_a_finished_run_is_refused(simulate: Simulate, smoke_run: Path) -> None:
    before = (smoke_run / "summary.json").read_bytes()
    result = simulate("run", "smoke", "--runs", smoke_run.parent, "--name", "smoke")
    assert result.returncode == 51
    assert "finished" in result.stderr
    other = simulate("run", "smoke", "--runs", smoke_run.parent, "--name", "smoke", "--seed", 8)
    assert other.returncode == 51
    assert "another scenario" in other.stderr
    assert (smoke_run / "summary.json").read_bytes() == before


def test_a_run_of_version_0_1_is_verified_known_as_finished_and_resumed(
    simulate: Simulate, smoke_run: Path, tmp_path: Path
) -> None:
    """Its metrics.jsonl has the fields of each score beside those of the release."""
    run = tmp_path / "smoke"
    shutil.copytree(smoke_run, run)
    metrics = run / "metrics.jsonl"
    kept = [json.loads(line) for line in metrics.read_text().splitlines()]
    former = [{**event, **event.pop("score", {})} for event in kept]
    metrics.write_text("".join(json.dumps(event) + "\n" for event in former))
    assert simulate("verify", run).returncode == 0
    again = ("run", "smoke", "--runs", tmp_path, "--name", "smoke")
    assert "finished" in simulate(*again).stderr

    before = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    result = simulate(*again)
    assert result.returncode == 0, result.stderr
    assert json.loads((run / "summary.json").read_text())["curve"] == before["curve"]


def test_a_corrupt_ledger_stops_the_run_and_stays_as_it_is(
    simulate: Any, smoke_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "smoke"
    shutil.copytree(smoke_run, run)
    # As a run that was stopped before its end: resumed, it opens every ledger again.
    (run / "summary.json").unlink()
    ledger = run / "sites" / "hospital-a" / "state" / "ledger.sqlite"
    data = bytearray(ledger.read_bytes())
    position = data.rfind(b"reserved")
    data[position + 12] ^= 1
    ledger.write_bytes(data)
    result = simulate("run", "smoke", "--runs", tmp_path, "--name", "smoke")
    assert result.returncode == 33, result.stderr
    assert "ledger.sqlite" in result.stderr
    assert ledger.read_bytes() == bytes(data)


def test_the_curve_starts_before_training_and_rises(smoke_run: Path) -> None:
    summary = json.loads((smoke_run / "summary.json").read_text())
    accuracies = [point["score"]["accuracy"] for point in summary["curve"]]
    assert [point["round"] for point in summary["curve"]] == [0, 1, 2]
    assert accuracies[-1] > 0.2 > accuracies[0]


def test_flattening_what_peft_reads_gives_the_released_vector(smoke_run: Path) -> None:
    plan = plan_of(smoke_run)
    tensors = load_file(smoke_run / "adapter" / "adapter_model.safetensors")
    head = load_file(smoke_run / "adapter" / "head.safetensors")
    values = {name: value.numpy() for name, value in tensors.items()}
    values |= {f"head.{name}": value.numpy() for name, value in head.items()}
    released = read_vector(smoke_run / "adapter", plan)
    assert np.array_equal(flatten(values, plan.lora.tensors), released)
