"""The command ``minitf fourbit``: what is said of optimizer states of few bits, beside what is measured."""

from pathlib import Path

from minitf.analysis.claims import Claim, save_claims
from minitf.analysis.fourbit.claims import measure
from minitf.analysis.run_folder import ANEW, open_run_folder, writing_results


def run(out: Path, *, training: bool = True, overwrite: bool = False) -> list[Claim]:
    """Measure everything, write ``claims.json`` to ``out``, return the claims; without ``training``, in seconds.

    Raises:
        Problem: the folder cannot be used; its message is for people.
    """
    open_run_folder(out, {"job": "fourbit", "training": training}, overwrite=overwrite, resumable=False)
    claims = measure(quick=not training)
    with writing_results(out, ANEW):
        save_claims(out / "claims.json", claims)
    return claims
