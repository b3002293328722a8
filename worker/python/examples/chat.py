"""Questions over a long file: the KV stays in the service, each answer tells what that cost.

    python chat.py --model=DIR --server=HOST:PORT FILE [--ask="TEXT" ...]

Without --ask it reads questions from the terminal. The file is prefilled once per question.
"""

import argparse
import shutil
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import clusterkv.transformers as ckv


class Meter(TextStreamer):
    """Prints the answer as it comes and, while it comes, what is held, recalled and hit: on a terminal in a
    line of its own under the answer, elsewhere every 16 tokens on stderr."""

    def __init__(self, tokenizer, cache):
        super().__init__(tokenizer, skip_prompt=True)
        self.cache, self.line, self.tokens = cache, "", 0
        self.terminal = sys.stdout.isatty()

    def figures(self) -> str:
        s = self.cache.stats()
        return (f"  {self.tokens} tokens · held {s['held_bytes'] / 2**20:.1f} of "
                f"{s['full_bytes'] / 2**20:.1f} MiB ({s['held_bytes'] / max(1, s['full_bytes']):.1%}) · "
                f"recalled {s['recalled_tokens']:.0f} records, {s['recalled_bytes'] / 2**10:.0f} KiB · "
                f"answered {s['state_bytes'] / 2**10:.0f} KiB · hits {s['hit_rate']:.0%}")

    def put(self, value):
        prompt = self.next_tokens_are_prompt
        super().put(value)
        if prompt:
            return
        self.tokens += 1
        if not self.terminal and self.tokens % 16 == 0:
            print(self.figures(), file=sys.stderr, flush=True)

    def on_finalized_text(self, text, stream_end=False):
        if not self.terminal:
            print(text, end="\n" if stream_end else "", flush=True)
            return
        columns = shutil.get_terminal_size().columns - 1
        for character in text:
            if character == "\n" or len(self.line) >= columns:
                print(f"\r\033[K{self.line}")
                self.line = ""
            self.line += character.replace("\n", "")
        figures = self.figures()[:columns]
        # Line and figures, then back up to the line's end; at the end the cursor stays below both.
        back = "\n" if stream_end else f"\033[A\r\033[{len(self.line)}C" if self.line else "\033[A\r"
        print(f"\r\033[K{self.line}\n\033[K{figures}{back}", end="", flush=True)

    def end(self):
        super().end()
        if not self.terminal:
            print(self.figures(), file=sys.stderr, flush=True)


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
