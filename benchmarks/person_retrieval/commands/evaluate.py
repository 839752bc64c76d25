"""`evaluate`: Rank-k, mAP and mINP, both directions, of a run or of weights as they are; published figures beside."""

import argparse
import time
from pathlib import Path

from ..errors import RunError
from ..evaluation import as_dict, chance
from ..options import command_of, parser_of
from ..outputs import claim, write_result
from ..paper import SIZES, VIT_B_16_SHA256, ZERO_SHOT, beside
from ..scoring import SCORES, describe_score, metrics_by
from ..subject import Subject, add_subject, reading, subject_of
from ..training import World

__all__ = ["main"]

TOP_K = 32

SCORE_HELP = (
    "what images are ranked by: the cosine of global features (global, default), its mean with the similarity of words "
    "to patches (fused), or by that mean among the first --top-k alone (rerank)"
)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = parser_of("evaluate", __doc__)
    add_subject(parser)
    parser.add_argument("--zero-shot", action="store_true", help="the weights are those before any training on people")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="default: %(default)s")
    parser.add_argument("--score", choices=SCORES, default="global", help=SCORE_HELP)
    parser.add_argument("--top-k", type=int, help=f"of --score rerank: {TOP_K}")
    parser.add_argument("--out", type=Path, help="folder for evaluation.json; nothing is written without it")
    parser.add_argument("--overwrite", action="store_true", help="replace the evaluation.json that is in --out")
    args = parser.parse_args(argv)
    if args.top_k is not None and args.score != "rerank":
        raise RunError(f"--top-k must be left out: --score {args.score} has none")
    if args.top_k is not None and args.top_k < 1:
        raise RunError(f"--top-k must be 1 or more, got {args.top_k}")
    if args.overwrite and args.out is None:
        raise RunError("--overwrite must be left out: without --out nothing is written")
    if args.zero_shot and args.run is not None:
        raise RunError("--zero-shot must be left out: --run is of weights after training; name what it began with")
    args.top_k = args.top_k or TOP_K
    args.command = command_of("evaluate", argv)
    return args


def main(argv: list[str]) -> int:
    args = arguments(argv)
    file = args.out / "evaluation.json" if args.out else None
    if file is not None:
        claim(file, overwrite=args.overwrite)
    world = World.join(args.device)
    device = world.device
    subject = subject_of(args, world, args.split)
    start = time.perf_counter()
    batches = reading(args, subject.dataset)
    metrics = metrics_by(args.score, subject.model.to(device), subject.pairs, device, top_k=args.top_k, **batches)
    seconds = time.perf_counter() - start
    figures = as_dict(metrics)
    print(f"{subject.dataset} {args.split}: {subject.pairs.split}")
    print(f"weights: {subject.title}")
    if args.zero_shot:
        print("zero-shot: before any training on people")
    print(f"score: {describe_score(args.score, args.top_k)}\n\n{metrics}")
    print(f"\nt2i R1 by chance {chance(subject.pairs):.2f}; {seconds:.1f} s on {device}\n")
    print("\n".join(published(subject, figures["t2i"], args)))
    if file is not None:
        about = {**subject.about, "zero_shot": args.zero_shot, "score": args.score, "device": str(device)}
        about |= {"top_k": args.top_k} if args.score == "rerank" else {}
        about |= {"chance_R1": chance(subject.pairs), "seconds": round(seconds, 1)}
        about |= dict(zip(("identities", "images", "captions"), subject.counts, strict=True))
        records = [{"direction": direction, **values} for direction, values in figures.items()]
        write_result(file, "evaluation", args.command, about, records)
    return 0


def published(subject: Subject, figures: dict[str, float], args: argparse.Namespace) -> list[str]:
    """Lines that set the figures beside published ones, where both are of the same."""
    if subject.dataset not in SIZES:
        return [beside(subject.dataset, figures)]
    if subject.about["dry_run"]:
        return ["Published figures would say nothing beside those of a dry run."]
    if args.split != "test" or args.score != "global":
        return ["Published figures are of the test split, by the cosine of global features."]
    lines = [beside(subject.dataset, figures, ZERO_SHOT if args.zero_shot else "FMFA")]
    if args.zero_shot and subject.about["weights_sha256"] == VIT_B_16_SHA256:
        lines.append("These are the same weights: the SHA-256 is that of OpenAI's ViT-B-16.pt.")
    elif args.zero_shot:
        lines.append(
            "The published figures are of OpenAI's ViT-B-16.pt. The file here is another: figures agree only if it "
            "holds the same weights."
        )
    sizes = SIZES[subject.dataset]["test"]
    if sizes != subject.counts:
        told = "{} identities, {} images, {} captions"
        lines.append(f"The published test split has {told.format(*sizes)}; this one {told.format(*subject.counts)}.")
    return lines
