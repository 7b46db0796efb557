"""Every attack on the secure sums and the transcript that a test carries out, and the line of code that stops it.

docs/spec/attacks.md is the same list for readers. `tests/e2e/test_defences.py` takes each line away and sees that the
tests named here fail without it.
"""

from dataclasses import dataclass

SUMS = "src/tacit/federated/secure_sum/"
ATTACKS = "unit/test_secure_sum_attacks.py::"
MASKED = "unit/test_secure_sum_masked.py::"
SHARED = "unit/test_secure_sum_shared.py::"
PARTS = "unit/test_secure_sum_parts.py::"
UNIFORM = "statistical/test_secure_sum_uniform.py::"
CRASHES = "e2e/test_secure_sum_crashes.py::"
TRANSCRIPT = "unit/test_transcript.py::"
AUDIT = "unit/test_audit.py::"


@dataclass(frozen=True)
class Defence:
    """What stops an attack.

    Args:
        attack: as docs/spec/attacks.md calls it.
        tests: that carry it out, below ``tests/``.
        file: where it is stopped.
        line: what stops it; once in the file.
        without: the same without it.
    """

    attack: str
    tests: tuple[str, ...]
    file: str
    line: str
    without: str


def _of(attack: str, tests: str | tuple[str, ...], file: str, line: str, without: str) -> Defence:
    return Defence(attack, (tests,) if isinstance(tests, str) else tests, file, line, without)


CLIENT, SERVER = SUMS + "client.py", SUMS + "server.py"
SURVIVORS, KEYS = ATTACKS + "TestLyingAboutSurvivors::", ATTACKS + "TestLyingAboutKeys::"
BOXES, ROUND = ATTACKS + "TestLyingAboutShares::", ATTACKS + "TestLyingAboutTheRound::"
WAY, CORRUPT = ATTACKS + "TestOnTheWay::", ATTACKS + "TestCorruptClients::"

DEFENCES = (
    # The masked sum: a server that lies.
    _of(
        "different survivors told to different clients",
        SURVIVORS + "test_different_survivor_sets_are_noticed_before_any_share_is_released",
        CLIENT,
        "if not self._verify(self._invite.identities[signer], self._context, content, signature):",
        "if False:",
    ),
    _of(
        "survivors confirmed by fewer than the threshold",
        SURVIVORS + "test_too_few_confirmations_of_ones_own_set",
        CLIENT,
        "        if len(signers) < self._sharing.threshold:\n",
        "        if not signers:\n",
    ),
    _of(
        "one confirmation counted twice, or a client's own",
        (
            SURVIVORS + "test_a_confirmation_does_not_count_twice",
            SURVIVORS + "test_ones_own_confirmation_does_not_count",
        ),
        CLIENT,
        "if len(set(signers)) != len(signers) or not self._survivors.intersection(self._holders).issuperset(signers):",
        "if False:",
    ),
    _of(
        "both kinds of share asked for: a second set of survivors",
        (
            SURVIVORS + "test_a_server_that_asks_for_the_other_share_of_a_victim_gets_none",
            SURVIVORS + "test_no_order_of_true_and_false_messages_releases_both_shares_of_anyone",
            CRASHES + "TestServer::test_what_was_told_before_the_crash_cannot_be_told_otherwise_after_it",
        ),
        CLIENT,
        "        if self._state is State.MASKED and isinstance(message, Survivors) and stage == 3:",
        "        if self._state in (State.MASKED, State.CONFIRMED) and isinstance(message, Survivors):",
    ),
    _of(
        "both kinds of share of one client in one answer",
        SURVIVORS + "test_one_kind_of_share_is_released_of_each_client",
        CLIENT,
        "            for owner, both in sorted(self._live().held.items())\n",
        "            for owner, both in sorted([*self._live().held.items(), *self._live().held.items()])\n",
    ),
    _of(
        "a client told that it has not survived, or fewer than the minimum have",
        SURVIVORS + "test_impossible_survivors",
        CLIENT,
        '        if len(survivors) < self._invite.minimum:\n            raise PeerError(f"{len(survivors)} vectors',
        '        if False:\n            raise PeerError(f"{len(survivors)} vectors',
    ),
    _of(
        "survivors who never shared their secrets",
        SURVIVORS + "test_a_client_that_did_not_share_cannot_survive",
        CLIENT,
        "        if self._number not in survivors or not survivors <= self._sharers:",
        "        if self._number not in survivors:",
    ),
    _of(
        "keys exchanged in the roster",
        (
            KEYS + "test_swapped_keys_of_another_client",
            KEYS + "test_keys_signed_by_another_member",
            KEYS + "test_two_members_keys_exchanged",
            KEYS + "test_keys_of_an_earlier_round",
        ),
        CLIENT,
        "if not self._verify(self._invite.identities[client], self._context, messages.encode(advert), signature):",
        "if False:",
    ),
    _of(
        "a client's own keys exchanged",
        KEYS + "test_other_keys_than_ones_own",
        CLIENT,
        "        if (own.mask_key, own.seal_key) != (secrets.mask_pair.public, secrets.seal_pair.public):",
        "        if False:",
    ),
    _of(
        "a key of low order",
        KEYS + "test_a_key_of_low_order",
        SUMS + "agreement.py",
        '            raise PeerError(f"client {first} or {second} advertised a key of low order") from None\n',
        "            secret = bytes(32)\n",
    ),
    _of(
        "members left out of the roster",
        KEYS + "test_a_roster_that_leaves_clients_out",
        CLIENT,
        "        if len(members) < self._invite.minimum:\n",
        "        if False:\n",
    ),
    _of(
        "too few members for the privacy that the client wants",
        KEYS + "test_a_roster_too_small_for_the_clients_assumption",
        CLIENT,
        "        if bits < PRIVACY_BITS - _ROSTER_SLACK_BITS:",
        "        if False:",
    ),
    _of(
        "shares changed, exchanged or made up on the way",
        (BOXES + "test_a_changed_inbox", BOXES + "test_shares_sealed_for_another_holder"),
        SUMS + "agreement.py",
        'raise PeerError(f"the shares that client {sender} sealed for client {recipient} do not open") from None',
        "return bytes(SHARES_BYTES)",
    ),
    _of(
        "sharers that are no members, or without the client itself",
        BOXES + "test_changed_sharers",
        CLIENT,
        "        if self._number not in sharers or not sharers <= self._place.keys():",
        "        if False:",
    ),
    _of(
        "so few holders left that shares could be gathered",
        BOXES + "test_too_few_holders_left",
        CLIENT,
        "        if len(sharers.intersection(self._holders)) < self._sharing.threshold:",
        "        if False:",
    ),
    _of(
        "so few partners left that a client could be cut off",
        BOXES + "test_too_few_partners_left",
        CLIENT,
        "        if len(live) < self._sharing.least_partners:",
        "        if False:",
    ),
    _of(
        "a flood of shares to hold",
        BOXES + "test_more_clients_choose_one_holder_than_chance_allows",
        CLIENT,
        "        if len(senders) > most:",
        "        if False:",
    ),
    _of(
        "a cohort with strangers, or the round of another sum",
        ROUND + "test_a_round_that_a_client_does_not_agree_to",
        CLIENT,
        "if self._identity.public not in invite.identities or not self._pinned.issuperset(invite.identities):",
        "if self._identity.public not in invite.identities:",
    ),
    _of(
        "a round for another model, encoding or run",
        (
            ROUND + "test_a_sum_of_something_else_than_a_client_expects",
            TRANSCRIPT + "TestWhatPartiesSigned::test_clients_refuse_a_round_that_is_for_something_else",
        ),
        CLIENT,
        "if task is None or subject != task.subject:",
        "if task is None or (subject.length, subject.bits) != (task.length, task.ring.bits):",
    ),
    _of(
        "clients told that they sum for different things, once their keys and shares are out",
        (ROUND + "test_clients_that_were_told_different_subjects_release_nothing_and_their_masks_stay",),
        SUMS + "messages.py",
        '    return digest(b"sum", transcript, encode(subject))',
        "    return transcript",
    ),
    _of(
        "a minimum cohort below the client's own",
        ROUND + "test_a_cohort_below_the_clients_own_minimum",
        CLIENT,
        "        if invite.minimum < policy.minimum:",
        "        if False:",
    ),
    _of(
        "a threshold that corrupt holders reach, or too few partners",
        (
            ROUND + "test_a_threshold_that_corrupt_holders_reach",
            ROUND + "test_so_few_partners_that_a_client_can_be_cut_off",
            ROUND + "test_too_few_members_for_the_clients_assumption",
        ),
        CLIENT,
        "        if bits < PRIVACY_BITS:",
        "        if False:",
    ),
    _of(
        "settings that contradict each other",
        (ROUND + "test_a_round_that_a_client_does_not_agree_to", ROUND + "test_a_server_checks_its_settings_too"),
        SUMS + "messages.py",
        "    if not (1 <= m <= k <= n - 1 and 2 <= t <= k and t < invite.minimum <= n):",
        "    if False:",
    ),
    # The masked sum: on the way.
    _of(
        "messages of another round, to a client",
        WAY + "test_messages_of_another_round_are_refused",
        SUMS + "messages.py",
        "    if isinstance(message, Invite) or message.context != context:",
        "    if isinstance(message, Invite):",
    ),
    _of(
        "messages signed by another key, or changed",
        (
            WAY + "test_messages_signed_by_the_wrong_key_are_refused",
            WAY + "test_nobody_answers_in_anothers_name",
            WAY + "test_messages_of_another_round_are_refused",
            WAY + "test_every_flipped_bit_of_an_answer_is_refused",
        ),
        SERVER,
        "if not self._verify(self._invite.identities[sender], self._context, envelope.content, envelope.signature):",
        "if False:",
    ),
    _of(
        "a message sent twice to the server",
        WAY + "test_a_message_that_arrives_twice_at_the_server_counts_once",
        SERVER,
        "        if sender not in self._awaited or sender in self._arrived:",
        "        if sender not in self._awaited:",
    ),
    _of(
        "a message sent twice to a client, or out of order",
        (
            WAY + "test_a_message_that_arrives_twice_at_a_client_is_answered_once",
            WAY + "test_messages_of_other_stages_are_refused_in_this_one",
        ),
        CLIENT,
        "        if self._state is State.ADVERTISED and isinstance(message, Roster) and stage == 1:",
        "        if isinstance(message, Roster):",
    ),
    _of(
        "a message of another stage, to the server",
        WAY + "test_messages_of_other_stages_are_refused_in_this_one",
        SERVER,
        "        if stage != self._stage or not isinstance(message, _EXPECTED.get(self._stage, ())):",
        "        if False:",
    ),
    _of(
        "a vector changed on the way",
        (WAY + "test_every_flipped_bit_of_an_answer_is_refused", CORRUPT + "test_another_digest"),
        SERVER,
        "                if packed is None or vector_digest(packed) != message.digest:",
        "                if packed is None:",
    ),
    _of(
        "a second encoding of a message",
        ATTACKS + "TestFrames::test_a_second_encoding_of_a_message_is_refused",
        SUMS + "messages.py",
        "    if tensors or encode(message) != body:",
        "    if tensors:",
    ),
    _of(
        "a malformed vector: surplus bits",
        PARTS + "TestRing::test_unused_bits_are_zero",
        SUMS + "ring.py",
        "        if spare and int(packed[-1]) >> (32 - spare):",
        "        if False:",
    ),
    _of(
        "a malformed vector: a word too many or too few",
        PARTS + "TestRing::test_packed_vectors_of_another_size_are_refused",
        SUMS + "ring.py",
        "        if packed.shape != (self.packed_size(length),):",
        "        if False:",
    ),
    # The masked sum: corrupt clients.
    _of(
        "a wrong share of an own secret",
        (
            CORRUPT + "test_wrong_shares_of_one_holder_are_gone_round_if_there_are_more_than_t",
            CORRUPT + "test_wrong_shares_of_many_leave_no_sum_rather_than_a_wrong_one",
        ),
        SERVER,
        "            return own if commitment(own, self._roster_transcript, client) "
        "== self._commitments[client] else None",
        "            return own",
    ),
    _of(
        "a wrong share of a masking key",
        CORRUPT + "test_wrong_shares_of_a_lost_clients_key_leave_no_sum",
        SERVER,
        "            return pair if pair.public == self._mask_keys[client] else None",
        "            return pair",
    ),
    _of(
        "holders that are not chosen as the settings say",
        CORRUPT + "test_other_holders_than_the_settings_say",
        SERVER,
        "                    not fits\n",
        "                    False\n",
    ),
    _of(
        "a client that confirms another set",
        CORRUPT + "test_another_set_of_survivors",
        SERVER,
        "                if message.survivors != messages.bit_mask(self._survivors, len(self._invite.identities)):",
        "                if False:",
    ),
    _of(
        "a client that withholds or adds shares",
        CORRUPT + "test_other_shares_than_it_holds",
        SERVER,
        "if {owner for owner, _ in message.shares} != self._held[sender] or len(message.shares) != len(\n"
        "                    self._held[sender]\n                ):",
        "if False:",
    ),
    _of(
        "a client that was shown another roster",
        CORRUPT + "test_another_roster",
        SERVER,
        "        if not isinstance(message, Advert) and message.transcript != self._transcript:",
        "        if False:",
    ),
    _of(
        "a sum below the threshold or the minimum",
        MASKED + "TestOnce::test_a_server_closes_no_stage_with_too_few_answers",
        SERVER,
        "            if len(arrived) < fewest:",
        "            if not arrived:",
    ),
    # The masked sum: what is secret.
    _of(
        "keys that outlive their use",
        MASKED + "TestOnce::test_secrets_are_gone_at_the_end",
        CLIENT,
        "            del secrets.mask_pair, secrets.own, secrets.seal_pair\n",
        "",
    ),
    _of(
        "a client copied, to mask twice",
        MASKED + "TestOnce::test_a_client_cannot_be_copied",
        CLIENT,
        '        raise InputError("a client cannot be copied: its masks would be used twice")',
        "        return super().__reduce_ex__(protocol)",
    ),
    _of(
        "two vectors under one mask",
        MASKED + "TestOnce::test_a_vector_is_masked_once",
        CLIENT,
        "        if self._state is not State.READY:",
        "        if self._state not in (State.READY, State.MASKED):",
    ),
    _of(
        "a sum that overflows the ring",
        (
            PARTS + "TestEncoding::test_sums_that_could_overflow_are_refused",
            PARTS + "TestEncoding::test_the_edge_of_32_bits",
        ),
        SUMS + "encoding.py",
        "        if self._ring_bits > 32:",
        "        if False:",
    ),
    _of(
        "a ring one bit too small",
        (
            PARTS + "TestEncoding::test_the_ring_just_holds_the_extreme_sum",
            PARTS + "TestEncoding::test_the_extreme_sum_survives_the_masked_protocol",
        ),
        SUMS + "encoding.py",
        "        return (self.clients * self._largest).bit_length() + 1",
        "        return (self.clients * self._largest).bit_length()",
    ),
    _of(
        "a mask that is not uniform, or that comes back",
        (
            UNIFORM + "test_masked_vectors_are_uniform",
            UNIFORM + "test_any_three_of_four_masked_vectors_sum_to_something_uniform",
        ),
        "src/tacit/ring/prg.py",
        "                prg._update_into(part.nbytes, out)\n",
        "                prg._update_into(part.nbytes, out)\n                drawn[1::50] = 0\n",
    ),
    _of(
        "the stream of one round in another",
        UNIFORM + "test_no_mask_comes_back_in_another_round_or_at_another_client",
        "src/tacit/ring/prg.py",
        "        self._seed = bytes(seed)\n",
        "        self._seed = bytes(SEED_BYTES)\n",
    ),
    # The shared sum.
    _of(
        "a part changed, exchanged or replayed by a relay",
        SHARED + "TestRefusals::test_a_relay_cannot_read_change_swap_or_replay_parts",
        SUMS + "shared_server.py",
        "message.transcript != self._transcript or message.recipient != recipient:",
        "message.recipient != recipient:",
    ),
    _of(
        "a part in another client's name",
        SHARED + "TestRefusals::test_nobody_sends_in_another_clients_name",
        SUMS + "shared_server.py",
        "        if not verify(identity, self._transcript, signed_content(number, message.key), message.signature):",
        "        if False:",
    ),
    _of(
        "a second part of one client",
        SHARED + "TestRefusals::test_a_relay_cannot_read_change_swap_or_replay_parts",
        SUMS + "shared_server.py",
        "        if number in self._waiting or number in self._settled:",
        "        if False:",
    ),
    _of(
        "parts of two uploads put together",
        (
            SHARED + "TestRefusals::test_parts_of_two_uploads_are_not_put_together",
            CRASHES + "TestShared::test_a_client_that_is_killed_while_it_sends",
        ),
        SUMS + "shared_server.py",
        "for number, key in self.claims.items() if other.get(number) == key)",
        "for number, key in self.claims.items() if number in other)",
    ),
    _of(
        "a malformed vector in a part",
        SHARED + "TestRefusals::test_a_malformed_vector_is_refused_when_it_arrives",
        SUMS + "shared_server.py",
        "        if self.role is Role.BOB:\n            ring.require_packed(",
        "        if False:\n            ring.require_packed(",
    ),
    _of(
        "a key of a relay's in a server's place",
        (
            SHARED + "TestRefusals::test_a_relay_that_puts_its_own_key_in_a_servers_place",
            SHARED + "TestRefusals::test_a_client_insists_on_its_servers_minimum_and_task",
        ),
        SUMS + "shared_client.py",
        '            if not verify(identity, terms.transcript, endorsed(role), endorsements.get(role, b"")):',
        "            if False:",
    ),
    _of(
        "one key for both servers",
        SHARED + "TestRefusals::test_one_key_for_both_servers",
        SUMS + "shared_messages.py",
        "    if terms.alice == terms.bob:",
        "    if False:",
    ),
    _of(
        "one party as both servers",
        SHARED + "TestRefusals::test_a_client_insists_on_its_servers_minimum_and_task",
        SUMS + "shared_client.py",
        "        if self.alice == self.bob:",
        "        if False:",
    ),
    _of(
        "a sum of fewer than the minimum, in shares",
        SHARED + "TestSum::test_every_pattern_of_lost_parts",
        SUMS + "shared_server.py",
        "        if len(self._summed) < terms.minimum:",
        "        if False:",
    ),
    _of(
        "a sum revealed twice, under other noise",
        SHARED + "TestSum::test_a_sum_is_revealed_once",
        SUMS + "shared_server.py",
        "        self._open = False\n",
        "",
    ),
    _of(
        "a server copied, to reveal twice",
        CRASHES + "TestShared::test_a_server_cannot_be_copied",
        SUMS + "shared_server.py",
        "    def __reduce_ex__(self, protocol: object) -> NoReturn:",
        "    def unused(self, protocol: object) -> NoReturn:",
    ),
    _of(
        "a round taken up again by a server that was restarted",
        CRASHES + "TestShared::test_a_killed_servers_round_cannot_be_summed_again",
        SUMS + "shared_server.py",
        "        if terms.key_of(role) != pair.public:",
        "        if False:",
    ),
    _of(
        "shares of sums of different clients",
        SHARED + "TestSum::test_shares_of_different_sets_do_not_add_up",
        SUMS + "shared_server.py",
        "    if len(digests) != 1:",
        "    if False:",
    ),
    _of(
        "a part that shows the vector",
        SHARED + "TestSum::test_each_part_alone_is_uniform_whatever_the_vector",
        SUMS + "shared_client.py",
        "    Prg(seed).add_into(difference, subtract=True)\n",
        "",
    ),
    _of(
        "a vector beyond the bound",
        (
            SHARED + "TestNorms::test_a_vector_beyond_the_bound_fails",
            SHARED + "TestNorms::test_bad_clients_are_excluded_and_the_rest_are_summed",
        ),
        SUMS + "shared_bounds.py",
        "    return ROWS * bound * bound * 4 // 5\n",
        "    return 1 << 59\n",
    ),
    _of(
        "a vector whose squares wrap the ring",
        SHARED + "TestNorms::test_vectors_built_so_that_their_squares_wrap_are_excluded",
        SUMS + "shared_bounds.py",
        "        rows[:size] = torch.from_numpy((bits[:, 0] - bits[:, 1]).view(np.int8))\n",
        "        rows[:size] = 1.0\n",
    ),
    _of(
        "a vector made for a coin that is known",
        SHARED + "TestNorms::test_a_vector_made_for_an_earlier_coin_is_excluded",
        SUMS + "shared_bounds.py",
        "    seed = yield from toss()\n",
        "    seed = (yield from toss()) * 0\n",
    ),
    _of(
        "a vector that is added unchecked",
        SHARED + "TestRefusals::test_unchecked_vectors_are_not_added_where_norms_are_verified",
        SUMS + "shared_server.py",
        "            if self.terms.bound:\n",
        "            if False:\n",
    ),
    _of(
        "terms under which norms could wrap",
        SHARED + "TestRefusals::test_terms_that_cannot_be_safe",
        SUMS + "shared_messages.py",
        "    if LEAST_ROOM * terms.bound > 1 << terms.bits:",
        "    if False:",
    ),
    # Attestations and transcripts.
    _of(
        "settings or survivors changed after the round",
        MASKED + "TestAttestation::test_a_changed_one_is_noticed",
        SUMS + "attestation.py",
        "            if not verify(invite.identities[signer], context, content, signature):",
        "            if False:",
    ),
    _of(
        "terms or clients changed after the round, in shares",
        SHARED + "TestAttestation::test_every_term_is_signed",
        SUMS + "shared_attestation.py",
        "            if not verify(terms.identities[number], transcript, signed_content(number, key), signature):",
        "            if False:",
    ),
    _of(
        "servers that did not sign whose vectors they summed",
        (SHARED + "TestAttestation::test_every_claim_is_signed", SHARED + "TestAttestation::test_wrong_pins"),
        SUMS + "shared_attestation.py",
        "            if not verify(identity, transcript, content, signature):",
        "            if False:",
    ),
    _of(
        "an identity that is not pinned",
        (MASKED + "TestAttestation::test_every_identity_is_pinned", TRANSCRIPT + "TestPins::test_wrong_pins"),
        SUMS + "attestation.py",
        "        if not pinned.issuperset(invite.identities):",
        "        if False:",
    ),
    _of(
        "an entry changed by whoever keeps it",
        (
            TRANSCRIPT + "TestSomebodyWhoKeepsIt::test_every_byte_of_every_entry_counts",
            TRANSCRIPT + "TestSomebodyWhoKeepsIt::test_another_signature",
        ),
        "src/tacit/federated/audit.py",
        "            if not identity.verify(pins.coordinator, SIGNED, sealed.content, sealed.signature):",
        "            if False:",
    ),
    _of(
        "a round dropped, repeated or moved",
        (
            TRANSCRIPT + "TestSomebodyWhoKeepsIt::test_a_dropped_round",
            TRANSCRIPT + "TestSomebodyWhoKeepsIt::test_a_duplicated_round",
            TRANSCRIPT + "TestSomebodyWhoKeepsIt::test_two_rounds_exchanged",
            TRANSCRIPT + "TestSomebodyWhoKeepsIt::test_the_same_runs_round_of_another_history",
        ),
        "src/tacit/federated/audit.py",
        "        if purpose.previous != self._head:",
        "        if False:",
    ),
    _of(
        "another run's round",
        TRANSCRIPT + "TestSomebodyWhoKeepsIt::test_another_runs_round_in_its_place",
        "src/tacit/federated/audit.py",
        "        if purpose.run != self._run:",
        "        if False:",
    ),
    _of(
        "a coordinator that changes what a round was for, or drops one and chains over it",
        (
            TRANSCRIPT + "TestACoordinatorThatLies::test_a_changed_field",
            TRANSCRIPT + "TestACoordinatorThatLies::test_a_round_that_was_run_again_cannot_be_dropped",
            TRANSCRIPT + "TestACoordinatorThatLies::test_signatures_of_another_rounds_purpose",
        ),
        "src/tacit/federated/audit.py",
        "        if application != entry.purpose.application:",
        "        if False:",
    ),
    _of(
        "a model that no round produced",
        TRANSCRIPT + "TestACoordinatorThatLies::test_an_invented_round",
        "src/tacit/federated/audit.py",
        '            if entry.protocol == "none" and entry.after != purpose.model and entry.spent is None:',
        "            if False:",
    ),
    _of(
        "a model, history or ledger exchanged beside the transcript",
        (
            AUDIT + "TestTampered::test_is_named",
            AUDIT + "TestTampered::test_a_file_of_another_run_with_the_same_configuration",
        ),
        "src/tacit/runs/audit.py",
        "if digest not in came:",
        "if came.setdefault(digest, 0) < 0:",
    ),
    _of(
        "rounds cut off at the end",
        AUDIT + "TestTampered::test_the_transcript_that_an_earlier_audit_saw",
        "src/tacit/runs/audit.py",
        "        if self._known is not None and self._known != head:",
        "        if False:",
    ),
    _of(
        "an ε that the charges do not come to",
        AUDIT + "TestTampered::test_a_figure_of_privacy_that_the_charges_do_not_give",
        "src/tacit/runs/audit.py",
        "        if spent != said.epsilon and not abs(spent - said.epsilon) <= _CLOSE * spent:",
        "        if False:",
    ),
)
