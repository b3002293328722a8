"""Draws over the text which tokens each layer attended to exactly while the model answered.

    python draw_recall.py --model=DIR --server=HOST:PORT --out=recall.html FILE --ask="TEXT"
        [--plant="TEXT" --plant_at=0.4]

With --out=*.html one self-contained page: the text with tokens shaded by how often they were selected (any
layer, any KV head), and one strip per layer over the whole context. With --out=*.svg a picture: the strips,
and the passage that was selected most. --plant puts a sentence into the text first.
"""

import argparse
import collections
import html

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

import clusterkv.transformers as ckv

STRIP = 1000  # pixels


class Watch(StoppingCriteria):
    """Looks at every layer's selection after each generated token; never stops anything."""

    def __init__(self, cache, counts):
        self.cache, self.counts = cache, counts

    def __call__(self, input_ids, scores, **kwargs):
        if self.cache._decoders:
            for layer in range(self.cache.dense_layers, self.cache.config.num_hidden_layers):
                for head in self.cache.selected(layer):
                    self.counts[layer].update(head)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def strip(counts, tokens):
    """An SVG strip: darker where more of the context was selected."""
    cells = collections.Counter()
    for position, count in counts.items():
        cells[position * STRIP // tokens] += count
    top = max(cells.values(), default=1)
    bars = "".join(f'<rect x="{x}" width="2" height="18" fill="#c8553d" opacity="{0.15 + 0.85 * n / top:.2f}"/>'
                   for x, n in cells.items())
    return (f'<svg viewBox="0 0 {STRIP} 18" width="100%" height="18" preserveAspectRatio="none">'
            f'<rect width="{STRIP}" height="18" fill="#f1efe8"/>{bars}</svg>')


def page(tokenizer, ids, prompt, counts, answer):
    total = collections.Counter()
    for layer in counts.values():
        total.update(layer)
    top = max(total.values(), default=1)
    rows = "".join(f"<tr><th>layer {layer}</th><td>{strip(counts[layer], prompt)}</td></tr>"
                   for layer in sorted(counts))
    words = []
    for position, token in enumerate(ids[:prompt]):
        text = html.escape(tokenizer.decode([token]))
        if total[position]:
            text = f'<mark style="background:rgba(200,85,61,{0.15 + 0.85 * total[position] / top:.2f})">{text}</mark>'
        words.append(text)
    return f"""<!doctype html><meta charset="utf-8"><title>What was recalled</title>
<style>body{{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto}}table{{width:100%}}th{{width:5em;text-align:left}}
pre{{white-space:pre-wrap;font:13px/1.5 serif}}mark{{border-radius:2px}}</style>
<h1>What each layer recalled</h1><p>Answer: <b>{html.escape(answer)}</b></p><table>{rows}</table><pre>{"".join(words)}</pre>"""


def picture(tokenizer, ids, prompt, counts, asked, answer):
    """The strips of all layers, and the passage of 48 tokens that was selected most; the end of the prompt,
    which is near to every query, is not asked."""
    layers, total = sorted(counts), collections.Counter()
    for layer in layers:
        total.update(counts[layer])
    at = max(range(0, max(1, prompt - 512), 8), key=lambda i: sum(total[j] for j in range(i, i + 48)))
    top = max(total[i] for i in range(at, at + 48))
    left, line, bottom = 80, 26, 74 + 26 * len(layers)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {STRIP + left + 20} {bottom + 130}" '
           'font-family="sans-serif" font-size="15">',
           f'<rect width="{STRIP + left + 20}" height="{bottom + 130}" fill="white"/>',
           f'<text x="{left}" y="26">Asked after {prompt:,} tokens: “{html.escape(asked.strip())}”</text>',
           f'<text x="{left}" y="48">Answered: <tspan font-weight="bold">{html.escape(answer.strip())}'
           '</tspan>. What each layer attended to exactly, sinks and window left out:</text>']
    for i, layer in enumerate(layers):
        cells = collections.Counter()
        for position, count in counts[layer].items():
            cells[position * STRIP // prompt] += count
        darkest = max(cells.values(), default=1)
        y = 62 + line * i
        out.append(f'<text x="8" y="{y + 14}">layer {layer}</text><rect x="{left}" y="{y}" width="{STRIP}" '
                   'height="18" fill="#f1efe8"/>')
        out += [f'<rect x="{left + x}" y="{y}" width="2" height="18" fill="#c8553d" '
                f'opacity="{0.15 + 0.85 * n / darkest:.2f}"/>' for x, n in sorted(cells.items())]
    x = left + at * STRIP // prompt
    out.append(f'<path d="M{x} {bottom - 8}v12M{x - 4} {bottom}l4 -8l4 8" stroke="#47606e" fill="none"/>'
               f'<text x="{left}" y="{bottom + 24}" fill="#47606e">Here, at token {at:,}:</text>')
    column, y = left, bottom + 50
    for position in range(at, at + 48):
        text = " ".join(tokenizer.decode([ids[position]]).split("\n"))
        width = 8.2 * len(text)
        if column + width > left + STRIP:
            column, y = left, y + 24
        if total[position]:
            out.append(f'<rect x="{column:.1f}" y="{y - 15}" width="{width:.1f}" height="20" fill="#c8553d" '
                       f'opacity="{0.15 + 0.7 * total[position] / top:.2f}"/>')
        out.append(f'<text x="{column:.1f}" y="{y}" font-family="monospace" font-size="13.6" '
                   f'textLength="{width:.1f}" xml:space="preserve">{html.escape(text)}</text>')
        column += width
    return "\n".join(out) + "</svg>\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--model", required=True)
    parser.add_argument("--server", default="localhost:7400")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--ask", required=True)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--plant", default="", help="a sentence to put into the text")
    parser.add_argument("--plant_at", type=float, default=0.4, help="where, as a share of the text")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="clusterkv", dtype="auto")
    with open(options.file, encoding="utf-8", errors="replace") as file:
        ids = tokenizer.encode(file.read())[:options.context]
    at = int(len(ids) * options.plant_at)
    ids[at:at] = tokenizer.encode(options.plant, add_special_tokens=False)
    ids += tokenizer.encode(options.ask, add_special_tokens=False)
    cache = ckv.ClusterKVCache(model.config, server=options.server)
    counts = collections.defaultdict(collections.Counter)
    inputs = torch.tensor([ids])
    out = model.generate(inputs=inputs, attention_mask=torch.ones_like(inputs), past_key_values=cache,
                         do_sample=False, max_new_tokens=options.tokens,
                         stopping_criteria=[Watch(cache, counts)])
    answer = tokenizer.decode(out[0, len(ids):])
    with open(options.out, "w", encoding="utf-8") as file:
        if options.out.endswith(".svg"):
            file.write(picture(tokenizer, out[0].tolist(), len(ids), counts, options.ask, answer))
        else:
            file.write(page(tokenizer, out[0].tolist(), len(ids), counts, answer))
    cache.release()
    print(f"{options.out}: {answer!r}")


if __name__ == "__main__":
    main()
