"""Rounds over sites: Flower's strategy, the handlers of the real sites, and what becomes of those that fail."""

from contextlib import closing
from dataclasses import replace

import msgspec
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict

from site_rounds import CLEAR, MASKED, OPEN, SECRET, assert_same, lose, over_sites, simulated
from sites import Files, answering, grid_of, open_site, tables, write_files
from tacit.data.examples import Examples
from tacit.data.heart_disease import standardised
from tacit.errors import InputError
from tacit.federated.devices_schedule import RoundPolicy
from tacit.federated.evaluation import evaluate
from tacit.federated.secure_sum.attestation import Attestation
from tacit.federated.secure_sum.client import Policy
from tacit.federated.secure_sum.masked import MaskedSum
from tacit.federated.secure_sum.mean import SecureMean
from tacit.federated.transcript import unseal
from tacit.identity import Identity, key_text
from tacit.runs import build, config
from tacit.runs.data import signature
from tacit.runtimes.flower.client_app import client_app, content_of, frame_of
from tacit.runtimes.flower.messages import Refusal, frame_digest
from tacit.runtimes.flower.messages import unseal as unseal_letter
from tacit.runtimes.flower.strategy import Rounds
from tacit.runtimes.simulation import Evaluation, federate

CONTEXT = Context(1, 100, {}, RecordDict(), {})


def answering_one(files: Files, index: int):
    return closing(open_site(files, index))


def unseal_answer(files: Files, site: int, frame: bytes, question: bytes) -> Refusal:
    readers, writers = frozenset({files.coordinator.public}), frozenset({files.sites[site].public})
    return unseal_letter(frame, readers, writers, frame_digest(question)).reply()


def weights_of(result) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in result.arrays.items()}


def test_in_the_clear_the_global_model_is_the_simulators(tmp_path):
    examples = tables(4)
    files = write_files(tmp_path, examples, OPEN)
    with answering(files, 4) as sites:
        federation = over_sites(files, grid := grid_of(sites))
        result = Rounds(federation).start(grid, num_rounds=3)
    assert_same(weights_of(result), simulated(examples, 3).model.state_dict())
    assert [metrics["sites"] for metrics in result.train_metrics_clientapp.values()] == [4, 4, 4]


def test_by_a_secure_sum_the_global_model_is_the_simulators_and_its_rounds_are_signed(tmp_path):
    examples, entries = tables(4), []
    files = write_files(tmp_path, examples, SECRET)
    with answering(files, 4) as sites:
        federation = over_sites(files, grid := grid_of(sites), MASKED, entries=entries)
        rounds = Rounds(federation)
        result = rounds.start(grid, num_rounds=3)
    assert [record.lost for record in rounds.history] == [{}, {}, {}]
    expected = simulated(examples, 3, secure_sum=SecureMean(MaskedSum.among(4, Policy(3))))
    assert_same(weights_of(result), expected.model.state_dict())
    pinned = frozenset(files.federation.keys)
    for entry in entries:
        opened, _ = unseal(entry)
        attestation = Attestation.parse(opened.attestation)
        assert set(attestation.verify(pinned)) == pinned
        assert attestation.subject.application == opened.purpose.application


@pytest.mark.parametrize("stage", ["train.begin", "query.share", "query.mask", "query.confirm", "query.unmask"])
def test_a_site_lost_in_any_stage_is_named_and_the_others_go_on(tmp_path, stage):
    files = write_files(tmp_path, tables(4), SECRET)
    counts = stage in ("query.confirm", "query.unmask")
    with answering(files, 4) as sites:
        federation = over_sites(files, grid := grid_of(sites), MASKED)
        grid.meddle = lose(stage, node=102)
        record = federation.advance()
    assert record.cohort == ((0, 1, 2, 3) if counts else (0, 1, 3))
    assert counts or "did not answer" in record.lost[2]
    assert record.note == ""
    assert record.secure_sum.minimum == 3


def test_below_the_minimum_nothing_is_revealed_and_the_round_says_why(tmp_path):
    files = write_files(tmp_path, tables(4), SECRET)
    entries = []
    with answering(files, 4) as sites:
        federation = over_sites(files, grid := grid_of(sites), MASKED, entries=entries)
        grid.meddle = lambda stage, at, message: None if at > 101 and stage == "query.mask" else message
        before = federation.snapshot.state.parameters.clone()
        record = federation.advance()
    assert record.cohort == ()
    assert "2 clients are left in stage MASK, 3 are needed: no sum" in record.note
    assert set(record.lost) == {2, 3}
    assert torch.equal(federation.snapshot.state.parameters, before)
    assert unseal(entries[0])[0].protocol == "none"


def test_a_round_closes_when_enough_vectors_are_in(tmp_path):
    files = write_files(tmp_path, tables(4), SECRET)
    with answering(files, 4) as sites:
        federation = over_sites(files, grid := grid_of(sites), MASKED, RoundPolicy(close_at=3))
        record = federation.advance()
    assert len(record.cohort) == 3
    assert len([stage for stage, _ in grid.seen if stage == "query.confirm"]) == 3


def test_a_site_that_comes_back_takes_part_again(tmp_path):
    files = write_files(tmp_path, tables(4), SECRET)
    with answering(files, 3) as sites:
        federation = over_sites(files, grid := grid_of(sites), MASKED)
        assert federation.advance().cohort == (0, 1, 2)
        with answering_one(files, 3) as late:
            grid.apps[103] = client_app(late)
            assert federation.advance().cohort == (0, 1, 2, 3)
            del grid.apps[103]
        assert federation.advance().cohort == (0, 1, 2)
        with answering_one(files, 3) as again:
            grid.apps[203] = client_app(again)
            assert federation.advance().cohort == (0, 1, 2, 3)


def test_a_site_restarted_in_a_round_has_no_part_in_it_any_more(tmp_path):
    files = write_files(tmp_path, tables(4), SECRET)
    with answering(files, 3) as sites, answering_one(files, 3) as before, answering_one(files, 3) as after:
        grid = grid_of([*sites, before])

        def restarted(stage, node, message):
            if stage == "query.share":
                grid.apps[103] = client_app(after)
            return message

        grid.meddle = restarted
        record = over_sites(files, grid, MASKED).advance()
    assert record.cohort == (0, 1, 2)
    assert "no part in that round" in record.lost[3]


def test_a_site_with_another_key_is_not_heard(tmp_path):
    files = write_files(tmp_path, tables(4), SECRET)
    with answering(files, 3) as sites:
        (tmp_path / "site3.key").unlink()
        stranger = Identity.fresh()
        stranger.save(tmp_path / "site3.key")
        with pytest.raises(InputError, match="does not name site 'site3' with the key"):
            open_site(files, 3)
        text = (tmp_path / "federation.toml").read_text()
        forged = text.replace(key_text(files.sites[3].public), key_text(stranger.public))
        (tmp_path / "forged.toml").write_text(forged)
        own = (tmp_path / "site3.toml").read_text().replace("federation.toml", "forged.toml")
        (tmp_path / "site3.toml").write_text(own)
        with answering_one(files, 3) as strange:
            federation = over_sites(files, grid_of([*sites, strange]), MASKED)
            record = federation.advance()
    assert record.cohort == (0, 1, 2)
    assert any("whose key is not pinned" in note for note in federation.sites.asking.board.notes)


@pytest.mark.parametrize("direction", ["meddle", "back"])
@pytest.mark.parametrize("stage", ["query.hello", "train.begin", "query.share", "query.mask", "query.confirm"])
def test_a_superlink_that_changes_a_message_is_noticed(tmp_path, direction, stage):
    files = write_files(tmp_path, tables(4), SECRET)

    def flip(at, node, message):
        if at == stage and node == 101:
            frame = bytearray(frame_of(message))
            frame[-1] ^= 1
            message.content = content_of(bytes(frame))
        return message

    with answering(files, 4) as sites:
        federation = over_sites(files, grid := grid_of(sites), MASKED)
        setattr(grid, direction, flip)
        record = federation.advance()
    assert record.cohort == ((0, 1, 2, 3) if stage == "query.confirm" else (0, 2, 3))
    notes = " ".join(federation.sites.asking.board.notes)
    assert any(found in notes for found in ("changed on its way", "does not parse", "not those that its writer signed"))


def test_a_question_that_is_repeated_is_answered_once(tmp_path):
    files = write_files(tmp_path, tables(4), OPEN)
    kept = []
    with answering(files, 4) as sites:
        federation = over_sites(files, grid := grid_of(sites))
        grid.meddle = lambda stage, node, message: kept.append(message) or message
        federation.advance()
        again = next(message for message in kept if message.metadata.message_type == "train.begin")
        answer = unseal_answer(files, 0, frame_of(grid.apps[100](again, CONTEXT)), frame_of(again))
    assert answer.reason == "this question came before, and is answered once"


def test_a_coordinator_that_is_not_pinned_is_refused(tmp_path):
    files = write_files(tmp_path, tables(4), OPEN)
    with answering(files, 4) as sites:
        other = replace(files, coordinator=Identity.fresh())
        federation = over_sites(other, grid_of(sites))
        record = federation.advance()
    assert record.note == "1 sites are needed, and 0 are there"
    assert "whose key is not pinned here" in (tmp_path / "state0" / "journal.txt").read_text()


def test_other_sites_than_a_site_knows_are_refused(tmp_path):
    files = write_files(tmp_path, tables(4), SECRET)
    with answering(files, 4) as sites:
        federation = over_sites(files, grid_of(sites), MASKED)
        terms = federation.sites.terms
        federation.sites.terms = msgspec.structs.replace(terms, sites=(*terms.sites, Identity.fresh().public))
        record = federation.advance()
    assert set(record.lost) == {0, 1, 2, 3}
    assert all("not all in this site's own federation.toml" in reason for reason in record.lost.values())


def test_three_failed_rounds_in_a_row_end_the_run(tmp_path):
    files = write_files(tmp_path, tables(4), SECRET)
    with answering(files, 2) as sites:
        federation = over_sites(files, grid_of(sites), MASKED)
        for _ in range(2):
            assert federation.advance().note == "3 sites are needed, and 2 are there"


@pytest.mark.parametrize("algorithm", ['name = "scaffold"', 'name = "fedper"\npersonal = ["1.bias"]'])
@pytest.mark.parametrize("secret", [False, True])
def test_what_algorithms_keep_at_clients_stays_at_the_sites(tmp_path, algorithm, secret):
    examples, text = tables(4), MASKED if secret else CLEAR
    text = text.replace('name = "fedavg"', algorithm)
    files = write_files(tmp_path, examples, OPEN)
    with answering(files, 4) as sites:
        federation = over_sites(files, grid := grid_of(sites), text)
        result = Rounds(federation).start(grid, num_rounds=4)
    settings = config.parse(text)
    network = build.model(settings, signature(settings).blank(), tmp_path)
    secure = SecureMean(MaskedSum.among(4, Policy(3))) if secret else None
    simulation = federate(
        network, examples, algorithm=build.algorithm(settings, network), rounds=4, cohort=4, seed=3, secure_sum=secure
    )
    assert_same(weights_of(result), simulation.model.state_dict())
    assert set(federation.snapshot.memories) == {0, 1, 2, 3}
    assert all(memory.keys() == {"sites/counted"} for memory in federation.snapshot.memories.values())
    assert [path.name for path in (tmp_path / "state0" / "memories").glob("*/*")] != []


def test_the_model_is_tried_on_what_sites_keep_back(tmp_path):
    examples = tables(4)
    files = write_files(tmp_path, examples, SECRET + 'disclose = ["metrics"]\n', training=0.7)
    with answering(files, 4) as sites:
        federation = over_sites(files, grid := grid_of(sites), MASKED)
        rounds = Rounds(federation, Evaluation(at_clients=True, clients=()))
        rounds.start(grid, num_rounds=2)
        kept = [site._holding.kept for site in sites]
    together = Examples(torch.cat([own.inputs for own in kept]), torch.cat([own.targets for own in kept]))
    loss, accuracy = evaluate(federation.model(), together)
    assert rounds.history[-1].accuracy == pytest.approx(accuracy)
    assert rounds.history[-1].loss == pytest.approx(loss, abs=1e-3)
    each = [evaluate(federation.model(), own)[1] for own in kept]
    assert rounds.history[-1].clients.mean == pytest.approx(sum(each) / 4)
    told = federation.sites.asking.disclosed
    assert all(told[site].keys() == {"accuracy", "loss", "auc"} for site in range(4))


def test_features_are_standardised_by_the_moments_of_all_sites_together(tmp_path):
    examples = tables(4)
    files = write_files(tmp_path, examples, SECRET)
    text = MASKED.replace("classes = 2\n", "classes = 2\nstandardise = true\n")
    with answering(files, 4) as sites:
        federation = over_sites(files, grid := grid_of(sites), text)
        inputs = federation.standardise(4)
        Rounds(federation).start(grid, num_rounds=2)
    everything = torch.cat([own.inputs for own in examples]).double()
    assert torch.allclose(inputs["mean"], everything.mean(dim=0), atol=1e-6)
    assert torch.allclose(inputs["std"], everything.std(dim=0, correction=0), atol=1e-6)
    alike = [standardised(own, inputs["mean"], inputs["std"]) for own in examples]
    expected = simulated(alike, 2, secure_sum=SecureMean(MaskedSum.among(4, Policy(3))))
    assert_same(federation.model().state_dict(), expected.model.state_dict())


def test_the_strategy_begins_from_arrays_and_has_no_use_for_flowers_own_loop(tmp_path):
    files = write_files(tmp_path, tables(4), OPEN)
    weights = {"1.weight": torch.ones(2, 4), "1.bias": torch.zeros(2)}
    with answering(files, 4) as sites:
        federation = over_sites(files, grid := grid_of(sites))
        rounds = Rounds(federation)
        with pytest.raises(InputError, match="not the parameters"):
            rounds.start(grid, ArrayRecord({"weight": torch.ones(2, 4)}), num_rounds=1)
        with pytest.raises(InputError, match="another grid"):
            rounds.start(grid_of(sites), num_rounds=1)
        with pytest.raises(InputError, match="timeout has no use"):
            rounds.start(grid, num_rounds=1, timeout=3.0)
        seen = []
        rounds.start(
            grid, ArrayRecord(weights), 1, evaluate_fn=lambda number, arrays: seen.append((number, len(arrays)))
        )
        for call in (rounds.configure_train, rounds.configure_evaluate):
            with pytest.raises(InputError, match="call start"):
                call(1, ArrayRecord(), ConfigRecord(), grid)
        for call in (rounds.aggregate_train, rounds.aggregate_evaluate):
            with pytest.raises(InputError, match="call start"):
                call(1, [])
    assert seen == [(1, 2)]
    assert not torch.equal(federation.snapshot.state.parameters, torch.cat([torch.ones(8), torch.zeros(2)]))
