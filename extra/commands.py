"""And with the rooms of extra/: chat, draw candidates, and score as a reward model.

    python sample.py out/mine --chat                                   by its own template
    python sample.py out/mine --compare=REF --score=pairs.jsonl        implicit rewards, accuracy
    python sample.py out/mine --prompts=prompts.jsonl --n=4 --out=candidates.jsonl
    python sample.py out/mine --compare=REF --prompts=… --best_of=8    the best by implicit reward
    python sample.py out/mine --compare=REF --prompts=… --kl           KL(π‖π_ref)

Rewards and KL are measured against REF.
"""

import argparse

from extra.refusals import check_arguments


def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The command line of sample.py, with the flags of the rooms, and what is to be done with it as
    `command`. Raises DataError for flags that lack something, or would be ignored."""
    parser.description += "\n" + __doc__
    add = parser.add_argument
    add("--chat", action="store_true", help="talk to it, by its own chat template")
    add("--system", default="", help="system message of the chat")
    add("--score", metavar="FILE", help="implicit rewards of the responses in a .jsonl file")
    add("--best_of", type=int, metavar="N", help="the best of N samples, by implicit reward")
    add("--kl", action="store_true", help="KL from REF, estimated from samples")
    add("--out", metavar="FILE", help="write candidates or scores as .jsonl")
    add("--beta", type=float, help="of the implicit reward (default: the run's own, else 0.1)")
    args = parser.parse_args(arguments)
    check_arguments(args, {w.split("=")[0][2:] for w in arguments if w.startswith("--")})
    if args.chat:
        args.command = talk
    elif args.score or args.best_of or args.kl or args.out:
        args.command = measure
    return args


def talk(args, options: dict):
    from extra import chat

    chat.talk(args, options)


def measure(args, options: dict):
    from extra import reward

    reward.run(args, options)
