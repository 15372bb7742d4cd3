#!/usr/bin/env python
"""Write small, made-up corpora for the three heads: text classification, named entities, translation.

    python scripts/demo_data.py --output_dir outputs/demo_data --seed 0

Every sentence is drawn from the small grammars of demo/grammars.py; the columns are named as on the Hub:

- classification (`sentence`, `label`): a review. The label is the opinion of the clause that counts, which negation
  turns round, and which a second clause ("although ...", "... but ...", "people say that ...") can contradict.
- ner (`tokens`, `ner_tags` in IOB2): people, places and organisations. Surnames also occur inside places and company
  names, so that context decides, and about one in five names of the validation set never occurs in training.
- translation (`translation` of `en` to `xx`): into an invented language with the verb last, adjectives after the noun
  and agreeing with its gender and number, case endings, postpositions, and negation and tense on the verb.

What makes them hard for a small model, as real small data sets are: few examples, words drawn with Zipf's law so that
most are rare, sentences of the validation set never seen in training, and wrong labels in the training set only (the
rates are in `NOISE` of demo/corpora.py). The sizes and rates were set by looking at plain training alone (well above
chance, well below perfect); no run with R-Drop had any part in choosing them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from demo.corpora import write_demo_data
from finetuning.command_line import cli


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Path]]:
    """Command line; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="Folder to write.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of all three corpora (default: 0).")
    args = parser.parse_args(argv)
    paths = write_demo_data(args.output_dir, args.seed)
    for head, splits in paths.items():
        print(f"{head}: {', '.join(map(str, splits.values()))}")
    return paths


if __name__ == "__main__":
    cli(main)
