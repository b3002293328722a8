"""Sequences that a cache which loses tokens gets wrong: planted facts, repeated passages, running text.

Prompt forms are those that books-30m-32k was trained on (a fact, a question, a passage to repeat); other
models get the same text through their own tokenizer and are asked in plain words.
"""

from __future__ import annotations

import dataclasses
import random

ADJECTIVES = ("amber", "silver", "quiet", "hidden", "golden", "broken", "gentle", "frozen", "crimson",
              "ancient", "hollow", "velvet", "distant", "narrow", "rusty", "humble")
NOUNS = ("acorn", "harbor", "lantern", "meadow", "river", "castle", "mirror", "garden", "feather",
         "anchor", "candle", "valley", "hammer", "window", "basket", "ladder")
TAIL_TOKENS = 384


@dataclasses.dataclass
class Sequence:
    kind: str                       # "needle", "copy" or "text"
    ids: list[int]                  # the whole sequence
    prompt_tokens: int              # prefilled; the rest is decoded, teacher-forced
    scored: list[list[int]]         # groups of positions whose tokens are to be predicted


class Builder:
    """Makes sequences of `context` tokens out of texts. Deterministic in seed and index."""

    def __init__(self, tokenizer, texts: list[str], context: int, seed: int):
        self.tokenizer, self.context, self.seed = tokenizer, context, seed
        self.texts = [self.encode(text) for text in texts]
        vocabulary = tokenizer.get_vocab()
        self.bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        self.ask = [vocabulary["<ask>"]] if "<ask>" in vocabulary else self.encode("\n\nQuestion. ")
        self.recall = [vocabulary["<recall>"]] if "<recall>" in vocabulary else self.encode("\n\nAgain: ")
        self.eos = [vocabulary["<eos>"]] if "<eos>" in vocabulary else []

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def body(self, rng: random.Random, tokens: int) -> list[int]:
        text = rng.choice([t for t in self.texts if len(t) > tokens] or self.texts)
        start = rng.randrange(max(1, len(text) - tokens))
        return text[start:start + tokens]

    def build(self, kind: str, index: int) -> Sequence:
        rng = random.Random(f"{self.seed}/{kind}/{index}")
        return getattr(self, f"_{kind}")(rng)

    def _text(self, rng: random.Random) -> Sequence:
        ids = self.bos + self.body(rng, self.context - len(self.bos))
        prompt = self.context - TAIL_TOKENS
        return Sequence("text", ids, prompt, [list(range(prompt + 1, self.context))])

    def _fact(self, adjective: str, noun: str, code: str) -> tuple[list[int], list[int], list[int]]:
        middle = self.encode(f" {adjective}") + self.encode(f" {noun}") + self.encode(" is: ")
        digits = [token for digit in code for token in self.encode(digit)]
        fact = self.encode("\n\nThe secret number of the") + middle + digits + self.encode(".\n\n")
        question = self.ask + self.encode("The secret number of the") + middle
        return fact, question, digits

    def _needle(self, rng: random.Random) -> Sequence:
        names = rng.sample([(a, n) for a in ADJECTIVES for n in NOUNS], 12)
        facts = [self._fact(a, n, f"{rng.randrange(10 ** 6):06d}") for a, n in names]
        tail: list[int] = []
        groups: list[list[int]] = []
        for _, question, digits in rng.sample(facts, len(facts)):
            if len(tail) + len(question) + len(digits) > TAIL_TOKENS:
                break
            tail += question
            groups.append(list(range(len(tail), len(tail) + len(digits))))
            tail += digits
        room = self.context - len(tail) - len(self.bos) - sum(len(f) for f, _, _ in facts)
        body = self.body(rng, room)
        for place, (fact, _, _) in sorted(zip((rng.randrange(len(body)) for _ in facts), facts),
                                          key=lambda item: item[0], reverse=True):
            body[place:place] = fact
        ids = self.bos + body + tail
        prompt = len(ids) - len(tail)
        return Sequence("needle", ids, prompt, [[prompt + p for p in group] for group in groups])

    def _copy(self, rng: random.Random) -> Sequence:
        cue, length = 8, 48
        passages = TAIL_TOKENS // (cue + length + 2)
        body = self.body(rng, self.context - len(self.bos) - passages * (1 + cue + length + len(self.eos)))
        tail: list[int] = []
        groups: list[list[int]] = []
        for _ in range(passages):
            start = rng.randrange(len(body) - cue - length)
            tail += self.recall + body[start:start + cue]
            groups.append(list(range(len(tail), len(tail) + length)))
            tail += body[start + cue:start + cue + length] + self.eos
        ids = self.bos + body + tail
        prompt = len(ids) - len(tail)
        return Sequence("copy", ids, prompt, [[prompt + p for p in group] for group in groups])
