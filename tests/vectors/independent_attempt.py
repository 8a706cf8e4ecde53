"""A whole attempt a second time, from the draws of its sites; no line of the product runs."""

from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from vectors.independent import (
    derived,
    elements,
    framed,
    labelled,
    masked,
    public,
    shared,
    shares,
    statement,
)
from vectors.messagepack import pack


class Attempt:
    """The messages of every site and the sum, from the inputs of a vector."""

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs
        self.bits: int = inputs["ring_bits"]
        self.cohort: list[str] = inputs["header"]["cohort"]
        self.context = labelled("RoundHeader", pack(inputs["header"]))
        self.share_context = self.context
        self.mask_context = self.context
        self.threshold: int = inputs["rules"]["threshold"]
        self.sharing = self._answering("share", self.cohort)
        self.vectors_in = self._answering("mask", self.sharing)
        self.confirming = self._answering("confirm", self.vectors_in)
        self.revealing = self._answering("reveal", self.confirming)

    def _answering(self, stage: str, asked: list[str]) -> list[str]:
        return [site for site in asked if site not in self.inputs["silent"].get(stage, ())]

    def _secrets(self, site: str) -> list[bytes]:
        """Cipher secret, mask secret and self-mask seed: the first three draws."""
        return list(self.inputs["draws"][site][:3])

    def _draws_of_shares(self, site: str) -> list[bytes]:
        """The draws after the secrets: coefficients for both, then nonces by peer."""
        return list(self.inputs["draws"][site][3:])

    def _point(self, site: str) -> int:
        return self.cohort.index(site) + 1

    def adverts(self) -> dict[str, Any]:
        """The adverts of stage 1."""
        sent = {}
        for site in self._answering("advertise", self.cohort):
            cipher_secret, mask_secret, seed = self._secrets(site)
            fields = {
                "context": self.context,
                "site": site,
                "cipher_key": public(cipher_secret),
                "mask_key": public(mask_secret),
                "seed_commitment": labelled("seed commitment", self.context + seed + framed(site)),
                "ledger_head": self.inputs["ledger_head"],
            }
            sent[site] = statement(self.inputs["seeds"][site], "KeyAdvert", fields)
        return sent

    def share_of(self, owner: str, holder: str) -> tuple[bytes, bytes]:
        """The shares of a site's seed and mask key that another holds."""
        _, mask_secret, seed = self._secrets(owner)
        drawn = self._draws_of_shares(owner)
        first = drawn[: self.threshold - 1]
        second = drawn[self.threshold - 1 : 2 * (self.threshold - 1)]
        point = [self._point(holder)]
        return shares([seed, *first], point)[0], shares([mask_secret, *second], point)[0]

    def shares(self) -> dict[str, Any]:
        """The shares of stage 2; the nonces are the draws after the coefficients, by peer."""
        return self._shares_of(self.sharing)

    def _shares_of(self, senders: list[str]) -> dict[str, Any]:
        sent: dict[str, Any] = {}
        for site in senders:
            peers = [peer for peer in self.cohort if peer != site]
            start = 2 * (self.threshold - 1)
            nonces = self._draws_of_shares(site)[start : start + len(peers)]
            sent[site] = [
                {
                    "sender": site,
                    "recipient": peer,
                    "ciphertext": nonce + self._encrypted(site, peer, nonce),
                }
                for peer, nonce in zip(peers, nonces, strict=True)
            ]
        return sent

    def _encrypted(self, site: str, peer: str, nonce: bytes) -> bytes:
        agreed = shared(self._secrets(site)[0], public(self._secrets(peer)[0]))
        key = derived(agreed, "share", self.share_context, site, peer)
        bound = self.share_context + framed(site) + framed(peer)
        return ChaCha20Poly1305(key).encrypt(nonce, b"".join(self.share_of(site, peer)), bound)

    def masked(self) -> dict[str, bytes]:
        """The masked vectors of stage 3."""
        sent = {}
        for site in self.vectors_in:
            added = [derived(self._secrets(site)[2], "self mask", self.mask_context, site)]
            subtracted: list[bytes] = []
            for peer in self.sharing:
                if peer != site:
                    agreed = shared(self._secrets(site)[1], public(self._secrets(peer)[1]))
                    names = sorted((site, peer))
                    key = derived(agreed, "pairwise mask", self.mask_context, *names)
                    (added if site < peer else subtracted).append(key)
            vector = elements(self.inputs["vectors"][site], self.bits)
            sent[site] = masked(vector, self.bits, added, subtracted)
        return sent

    def confirmations(self) -> dict[str, Any]:
        """The signatures of stage 4."""
        fields = {"context": self.context, "sites": self.vectors_in}
        return {
            site: {
                "site": site,
                "signed": statement(self.inputs["seeds"][site], "Survivors", fields),
            }
            for site in self.confirming
        }

    def revealed(self) -> dict[str, Any]:
        """The revealed shares of stage 5."""
        return {
            site: [
                {
                    "owner": owner,
                    "kind": "self-mask" if owner in self.vectors_in else "mask-key",
                    "share": self.share_of(owner, site)[0 if owner in self.vectors_in else 1],
                }
                for owner in self.sharing
            ]
            for site in self.revealing
        }

    def whole(self) -> dict[str, Any]:
        """The whole attempt, in the form of a vector's output."""
        columns = zip(
            *(elements(self.inputs["vectors"][site], self.bits) for site in self.vectors_in),
            strict=True,
        )
        return {
            "context": self.context,
            "advertise": self.adverts(),
            "share": self.shares(),
            "mask": self.masked(),
            "confirm": self.confirmations(),
            "reveal": self.revealed(),
            "survivors": self.vectors_in,
            "total": masked([sum(column) for column in columns], self.bits, [], []),
        }


class PreparedAttempt(Attempt):
    """An attempt whose cohort prepared it: keys and shares of all, and the masks of those who came.

    Its `share` is what was prepared.
    """

    def __init__(self, inputs: Any) -> None:
        super().__init__(inputs)
        header = inputs["header"]
        self.preparation = labelled(
            "Preparation",
            pack(
                {
                    name: header[name]
                    for name in (
                        "federation",
                        "job",
                        "round",
                        "attempt",
                        "plan",
                        "roster",
                        "cohort",
                    )
                }
            ),
        )
        self.share_context = self.preparation
        self._bind_masks()
        self.sharing = self._answering("advertise", self.cohort)
        self.vectors_in = self._answering("mask", self.sharing)
        self.confirming = self._answering("confirm", self.vectors_in)
        self.revealing = self._answering("reveal", self.confirming)

    def _bind_masks(self) -> None:
        adverts = [labelled("mask advert", sent["statement"]) for sent in self.adverts().values()]
        self.mask_context = labelled("prepared masks", self.context + b"".join(sorted(adverts)))

    def prepared_keys(self) -> dict[str, Any]:
        """The signed keys of the whole cohort."""
        sent = {}
        for site in self.cohort:
            cipher_secret, mask_secret, _ = self._secrets(site)
            fields = {
                "context": self.preparation,
                "site": site,
                "cipher_key": public(cipher_secret),
                "mask_key": public(mask_secret),
            }
            sent[site] = statement(self.inputs["seeds"][site], "PreparedKeys", fields)
        return sent

    def whole(self) -> dict[str, Any]:
        """The whole attempt, in the form of a vector's output."""
        found = super().whole()
        del found["share"]
        return {
            "context": found.pop("context"),
            "preparation": self.preparation,
            "prepare": self.prepared_keys(),
            "fill": self._shares_of(self.cohort),
            **found,
        }


class SharedAgain(PreparedAttempt):
    """A prepared attempt some of whose sites were restarted: all share once more, those with fresh
    keys. Its `fill` is what was prepared, and its `share` what was used."""

    def __init__(self, inputs: Any) -> None:
        self.again = False
        super().__init__(inputs)
        self._begin()

    def _begin(self) -> None:
        """From here on, as after the restarts."""
        self.prepared = self.prepared_keys(), self._shares_of(self.cohort)
        self.again = True
        self.share_context = self.context
        self._bind_masks()

    def _drawn_before(self) -> int:
        return 3 + 2 * (self.threshold - 1) + len(self.cohort) - 1

    def _secrets(self, site: str) -> list[bytes]:
        if not self.again or site not in self.inputs["restarted"]:
            return super()._secrets(site)
        return list(self.inputs["draws"][site][self._drawn_before() :][:3])

    def _draws_of_shares(self, site: str) -> list[bytes]:
        if not self.again:
            return super()._draws_of_shares(site)
        start = self._drawn_before() + (3 if site in self.inputs["restarted"] else 0)
        return list(self.inputs["draws"][site][start:])

    def whole(self) -> dict[str, Any]:
        """The whole attempt, in the form of a vector's output."""
        keys, shares = self.prepared
        return {**super().whole(), "prepare": keys, "fill": shares, "share": self.shares()}
