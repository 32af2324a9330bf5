"""Bugs planted in the state of the plain LoRA table: kept from a forward, merge, step or file, or in its class."""
from __future__ import annotations

from minipeft.conformance.method import Planted
from minipeft.conformance.methods.lora_embedding.plain import LoraEmbedding
from minipeft.conformance.planted import SharedState, StaleForward, UsesLastInput

PLANTED = planted = Planted("embedding")


@planted("step_b_after_a", "StepInTurns")
class StepBAfterA(LoraEmbedding):
    def step(self, ids, g, lr):
        self.A = self.e.r(self.A - lr * self.vjp(ids, g)["A"])
        self.B = self.e.r(self.B - lr * self.vjp(ids, g)["B"])


@planted("forward_stale", "ForwardStale")
class ForwardStale(StaleForward, LoraEmbedding):
    pass


@planted("head_stale", "HeadStale")
class HeadStale(LoraEmbedding):
    def __init__(self, *args):
        super().__init__(*args)
        self.first = self.scale(), self.A, self.B

    def low_rank_head(self, h):
        s, A, B = self.first
        return self.e.r(s * self.e.mm(self.e.mm(h, B), A))


@planted("last_input", "LastInput")
class LastInput(UsesLastInput, LoraEmbedding):
    pass


@planted("codes_shared", "StateShared")
class CodesShared(SharedState, LoraEmbedding):
    shared = ("last",)

    def take(self, A, B, alpha):
        super().take(A, B, alpha)
        self.last = self.A

    def codes(self, ids):
        return self.last.T[ids]


@planted("rank_kept", "RankKept")
class RankKept(LoraEmbedding):
    def scale(self):
        return self.alpha / self.__dict__.setdefault("rank", len(self.A))


@planted("head_stays_merged", "HeadStaysMerged")
class HeadStaysMerged(LoraEmbedding):
    tied = None

    def merge(self):
        super().merge()
        self.tied = self.E

    def head(self, h):
        return super().head(h) if self.tied is None else self.e.mm(h, self.tied.T)


@planted("merged_decoder_adds_again", "MergedForwardAddsAgain")
class MergedDecoderAddsAgain(LoraEmbedding):
    def forward_decoder(self, ids):
        return self.e.r(self.E[self.checked(ids)] + self.low_rank(ids))


@planted("decoder_unchecked", "IdsUnchecked")
class DecoderUnchecked(LoraEmbedding):
    def forward_decoder(self, ids):
        return self.forward(ids % len(self.E))


@planted("unmerge_current", "UnmergesCurrent")
class UnmergeCurrent(LoraEmbedding):
    def unmerge(self):
        assert self.kept is not None
        self.E, self.kept = self.e.r(self.E - self.delta()), None


@planted("unmerge_unmerged", "UnmergesUnmerged")
class UnmergeUnmerged(LoraEmbedding):
    def unmerge(self):
        if self.kept is None:
            self.E = self.e.r(self.E - self.delta())
        else:
            super().unmerge()


@planted("alpha_zero", "AlphaZeroIsDefault")
class AlphaZero(LoraEmbedding):
    def read(self, alpha):
        return float(alpha or 16.0)
