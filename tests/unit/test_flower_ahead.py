"""Secure sums that are set up while the one before them ends: what they cost, and what becomes of them."""

from contextlib import closing
from itertools import pairwise

import msgspec
import pytest

from secure_sums import World
from site_rounds import MASKED, SECRET, assert_same, lose, over_sites, simulated
from sites import answering, grid_of, open_site, tables, untouched, write_files
from tacit.errors import CodecError, PeerError
from tacit.federated.secure_sum import messages
from tacit.federated.secure_sum.client import Policy, State, Task
from tacit.federated.secure_sum.masked import MaskedSum
from tacit.federated.secure_sum.mean import SecureMean
from tacit.federated.secure_sum.messages import Survivors
from tacit.federated.secure_sum.parameters import Assumption
from tacit.federated.secure_sum.server import MaskedServer, Stage
from tacit.federated.selection import Uniform
from tacit.identity import Identity
from tacit.runtimes.flower.client_app import HELLO, client_app
from tacit.runtimes.flower.messages import Begin, Terms
from tacit.sites.memory import SiteMemory
from tacit.sites.setups import Setups

FIVE = ["train.begin", "query.share", "query.mask", "query.confirm", "query.unmask"]
THREE = ["train.begin", "query.confirm", "query.unmask"]


def stages(grid, node: int) -> list[str]:
    """What a node was asked, but for who it is."""
    return [stage for stage, at in grid.seen if at == node and stage != HELLO]


def test_after_the_first_a_round_takes_three_exchanges_and_gives_the_simulators_model(tmp_path):
    examples = tables(4)
    files = write_files(tmp_path, examples, SECRET)
    with answering(files, 4) as sites:
        federation = over_sites(files, grid := grid_of(sites), MASKED)
        for _ in range(4):
            assert federation.advance().cohort == (0, 1, 2, 3)
    assert all(stages(grid, 100 + site) == FIVE + 3 * THREE for site in range(4))
    expected = simulated(examples, 4, secure_sum=SecureMean(MaskedSum.among(4, World(4).policy)))
    assert_same(federation.model().state_dict(), expected.model.state_dict())


def test_sums_of_an_evaluation_are_set_up_too(tmp_path):
    files = write_files(tmp_path, tables(4), SECRET, training=0.7)
    with answering(files, 4) as sites:
        federation = over_sites(files, grid := grid_of(sites), MASKED)
        found = []
        for _ in range(2):
            federation.advance()
            found.append(federation.evaluate(None)[1])
    evaluation = ["evaluate.begin", *THREE[1:]]
    assert stages(grid, 100) == FIVE + evaluation + THREE + evaluation
    assert all(0 < accuracy <= 1 for accuracy in found)


@pytest.mark.parametrize("stage", THREE)
def test_a_site_lost_in_any_stage_of_a_sum_that_was_set_up(tmp_path, stage):
    """The others go on, as the simulator does with the same drop-out; the round after sets up anew."""
    examples = tables(4)
    files = write_files(tmp_path, examples, SECRET)
    counts = stage != "train.begin"
    with answering(files, 4) as sites:
        federation = over_sites(files, grid := grid_of(sites), MASKED)
        assert federation.advance().cohort == (0, 1, 2, 3)
        grid.meddle = lose(stage, node=102)
        record = federation.advance()
        grid.meddle = untouched
        after = [federation.advance() for _ in range(2)]
    assert record.cohort == ((0, 1, 2, 3) if counts else (0, 1, 3))
    assert counts or "did not answer" in record.lost[2]
    assert [one.cohort for one in after] == [(0, 1, 2, 3)] * 2
    assert stages(grid, 100) == FIVE + THREE + FIVE + THREE
    asked = []

    def lost(client, at):
        if (client, at) == (2, Stage.MASK):
            asked.append(at)
        return (client, at) == (2, Stage.MASK) and len(asked) == 2 and not counts

    summing = MaskedSum(tuple(Identity.fresh() for _ in range(4)), World(4).policy, lost)
    expected = simulated(examples, 4, secure_sum=SecureMean(summing))
    assert_same(federation.model().state_dict(), expected.model.state_dict())


def test_a_site_restarted_between_rounds_is_lost_to_the_next_and_back_after_it(tmp_path):
    files = write_files(tmp_path, tables(4), SECRET)
    with answering(files, 3) as sites, closing(open_site(files, 3)) as before:
        federation = over_sites(files, grid := grid_of([*sites, before]), MASKED)
        assert federation.advance().cohort == (0, 1, 2, 3)
        with closing(open_site(files, 3)) as after:
            grid.apps[103] = client_app(after)
            record = federation.advance()
            assert record.cohort == (0, 1, 2)
            assert "restarted since the sum was set up" in record.lost[3]
            assert federation.advance().cohort == (0, 1, 2, 3)


def test_cohorts_that_change_take_sums_of_their_own(tmp_path):
    examples = tables(4)
    files = write_files(tmp_path, examples, SECRET)
    with answering(files, 4) as sites:
        federation = over_sites(files, grid := grid_of(sites), MASKED, selection=Uniform(3))
        cohorts = [federation.advance().cohort for _ in range(6)]
    assert len(set(cohorts)) > 1
    begun = [at for stage, at in grid.seen if stage == "train.begin"]
    assert len(begun) == 18
    shared = [at for stage, at in grid.seen if stage == "query.share"]
    changed = 1 + sum(one != other for one, other in pairwise(cohorts))
    assert len(shared) == 3 * changed
    # Three sites are too few to do without one of them.
    policy = Policy(3, Assumption(dropped=0.0))
    expected = simulated(examples, 6, cohort=3, secure_sum=SecureMean(MaskedSum.among(4, policy)))
    assert_same(federation.model().state_dict(), expected.model.state_dict())


WORLD, RUN = World(4), bytes(32)


def setups(folder) -> Setups:
    """Client 0's."""
    pinned = frozenset(identity.public for identity in WORLD.identities)
    return Setups(WORLD.identity(0), pinned, SiteMemory(folder), 2)


def begin(frame: bytes, run: bytes = RUN) -> Begin:
    return Begin(Terms(run, "", (WORLD.identity(0).public,)), 1, bytes(16), "train", bytes(32), frame, 0)


def test_a_sum_is_set_up_step_by_step_and_used_once(tmp_path):
    mine, server, others = setups(tmp_path), MaskedServer(WORLD.invite), WORLD.clients()[1:]
    frames = dict.fromkeys(range(4), server.invite())
    for stage in (Stage.ADVERTISE, Stage.SHARE):
        server.receive(mine.ahead(RUN, 1, WORLD.policy, frames[0]))
        for number, other in enumerate(others, 1):
            server.receive(other.receive(frames[number]))
        if stage is Stage.SHARE:
            server.about(WORLD.subject)
        frames = server.close()
    client = mine.client(begin(frames[0]), WORLD.policy)
    assert (client.state, client.invited) == (State.SHARED, 4)
    client.expect(Task(WORLD.ring, WORLD.length))
    client.receive(frames[0])
    server.receive(client.mask(WORLD.vector(0)))
    with pytest.raises(PeerError, match="no part in that sum"):
        mine.client(begin(frames[0]), WORLD.policy)


def test_an_invitation_is_answered_once_whatever_it_comes_with_and_after_a_restart(tmp_path):
    invite = WORLD.server.invite()
    assert setups(tmp_path).ahead(RUN, 1, WORLD.policy, invite)
    again = setups(tmp_path)
    with pytest.raises(PeerError, match="came before"):
        again.ahead(RUN, 1, WORLD.policy, invite)
    with pytest.raises(PeerError, match="came before"):
        again.client(begin(invite), WORLD.policy)


def test_frames_that_set_up_nothing_are_refused(tmp_path):
    mine = setups(tmp_path)
    context = WORLD.invite.context
    roster = messages.server_frame(1, messages.Roster(context, b"\x0f", bytes(4 * messages.ADVERT_BYTES)))
    survivors = messages.server_frame(3, Survivors(context, b"\x0f"))
    for frame in (roster, survivors):
        with pytest.raises(CodecError, match="sets up no sum"):
            mine.ahead(RUN, 1, WORLD.policy, frame)
        with pytest.raises(PeerError, match="no part in that sum"):
            mine.client(begin(frame), WORLD.policy)
    assert mine.ahead(RUN, 1, WORLD.policy, WORLD.server.invite())
    with pytest.raises(PeerError, match="other keys than this client's own"):
        mine.ahead(RUN, 1, WORLD.policy, roster)
    with pytest.raises(CodecError, match="comes before the invitation"):
        mine.ahead(RUN, 1, WORLD.policy, roster)


def test_a_new_sum_takes_the_place_of_the_one_that_was_set_up_and_few_runs_are_kept(tmp_path):
    mine = setups(tmp_path)
    other = msgspec.structs.replace(WORLD.invite, round=bytes(15) + b"\1")
    first = mine.ahead(RUN, 1, WORLD.policy, WORLD.server.invite())
    second = mine.ahead(RUN, 1, WORLD.policy, MaskedServer(other).invite())
    assert first != second
    for run in range(2):
        invite = msgspec.structs.replace(WORLD.invite, round=bytes(15) + bytes([2 + run]))
        mine.ahead(bytes([run]) * 32, 1, WORLD.policy, MaskedServer(invite).invite())
    assert len(mine._clients) == 2
