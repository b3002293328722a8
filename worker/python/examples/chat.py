"""Questions over a long file: the KV stays in the service, each answer tells what that cost.

    python chat.py --model=DIR --server=HOST:PORT FILE [--ask="TEXT" ...]

Without --ask it reads questions from the terminal. The file is prefilled once per question.
"""

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import clusterkv.transformers as ckv


class Meter(TextStreamer):
    """Prints tokens as they come and the cache's figures beside them, on a terminal in place."""

    def __init__(self, tokenizer, cache):
        super().__init__(tokenizer, skip_prompt=True)
        self.cache = cache

    def end(self):
        super().end()
        s = self.cache.stats()
        print(f"\n  held {s['held_bytes'] / 2**20:.1f} MiB of {s['full_bytes'] / 2**20:.1f} MiB "
              f"({s['held_bytes'] / max(1, s['full_bytes']):.1%}) · recalled {s['recalled_tokens']:.0f} tokens, "
              f"{s['recalled_bytes'] / 2**10:.0f} KiB · states {s['state_bytes'] / 2**10:.0f} KiB · "
              f"hits {s['hit_rate']:.0%}", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--model", required=True)
    parser.add_argument("--server", default="localhost:7400")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--context", type=int, default=8192, help="tokens of the file that are read")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--ask", action="append")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="clusterkv", dtype="auto")
    with open(options.file, encoding="utf-8", errors="replace") as file:
        book = tokenizer.encode(file.read())[:options.context]
    cache = ckv.ClusterKVCache(model.config, server=options.server, preset=options.preset,
                               budget=options.budget)
    for question in options.ask or iter(lambda: input("\n> "), ""):
        ids = torch.tensor([book + tokenizer.encode(question, add_special_tokens=False)])
        ckv.generate(model, cache, inputs=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                     max_new_tokens=options.tokens, streamer=Meter(tokenizer, cache))
        cache.reset()


if __name__ == "__main__":
    main()
