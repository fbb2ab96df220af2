"""Every objective on the built-in experiment, from one SFT model: the table of docs/objectives.md.

    python train.py                         # leaves the SFT model that all of them start from
    python experiments/losses.py            # each loss by its settings below
    python experiments/losses.py "dpo --beta=0.3" "simpo --beta=5 --gamma=0"     # these instead

The same β is not the same step in different losses (their slopes at the start differ), so each has
one at which it moves about as far from the reference as DPO does with β = 1.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from experiments.reviews import error, measure  # noqa: E402

SETTINGS = """dpo --beta=1
robust --beta=2
ipo --beta=0.17
hinge --beta=0.8
rdpo --beta=1
odpo --beta=3
exo --beta=1 --label_smoothing=0.1
discopop --beta=1
ipo_norm --beta=2
dpo_norm --beta=10
dpop --beta=0.1 --alpha=1
nca --beta=0.2
bco --beta=0.7
kto --beta=1
apo_zero --beta=1
apo_down --beta=1 --learning_rate=3e-5
sppo --beta=0.1
cal_dpo --beta=0.1
chipo --beta=0.4
fdpo_alpha --beta=1
fdpo_forward_kl --beta=0.5
fdpo_js --beta=3
simpo --beta=20 --gamma=0.5
cpo --beta=0.2
orpo --beta=3
slic --alpha=0.5
unlikelihood --alpha=0.6
sft
dpo --beta=0.5 --sft_weight=1
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("settings", nargs="*", help="a loss and its flags, as one word each")
    parser.add_argument("--base", default="out/reviews", help="the run with the SFT model")
    parser.add_argument("--count", type=int, default=5000, help="samples of each (default 5000)")
    args = parser.parse_args()
    if args.count < 2:
        parser.error("--count must be at least 2")
    base = Path(args.base)
    files = [
        f"--{name}={base / file}.jsonl" for name, file in (("data", "pairs"), ("eval_data", "eval"))
    ]
    rest = [
        "--batch_size=32",
        "--learning_rate=2e-4",
        "--sft_epochs=0",
    ]  # as the experiment has them
    start = base / "sft"
    print("| loss and settings | KL | true reward | share of what R\\* gains | accepted |")
    print("|---|---|---|---|---|")
    for line in args.settings or SETTINGS.splitlines():
        loss, *flags = line.split()
        out = base.parent / "losses" / line.replace(" --", "-").replace("=", "")
        fixed = [*files, *rest, f"--init_from={start}", f"--out_dir={out}"]
        command = [sys.executable, ROOT / "train.py", f"--loss={loss}", *fixed, *flags]
        if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
            sys.exit(2)  # its sentence stands above
        m = measure(out, start, args.count)
        kl, policy = m["KL"], m["DPO"]
        print(
            f"| {line.replace(' --', ' ')} | {kl.mean():.2f} ± {error(kl):.2f} "
            f"| {policy['rewards'].mean():.2f} ± {error(policy['rewards']):.2f} "
            f"| {m['gain'] / m['best']:.0%} ± {m['share_error']:.0%} "
            f"| {policy['accepted'].mean():.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
