"""A whole check of an export file: form, checksums, signature, hash chain, and every decision folded again.

Rule of this module: what it lets through may be imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, cast

from flyball_server.core.errors import Invalid
from flyball_server.exports.read import Export, ExportedRun, scan
from flyball_server.signing import fingerprint
from flyball_server.storage.journal import Journal
from flyball_server.verify import Verdict, verify


class Checked(NamedTuple):
    """What the check found. verdict: as for a stored run; `problem` is "" where the file is right.

    signer: the fingerprint of the key that signed, "" where it did not come to that. run: the rows, proved where
    there is no problem.
    """

    verdict: Verdict
    signer: str
    export: Export | None
    run: ExportedRun | None


def check(path: Path, key: bytes | None = None) -> Checked:
    """Check the file. key: the public key that must have signed it; without it any may have, and is only named."""
    try:
        export = scan(path)
    except Invalid as error:
        return Checked(Verdict(str(path), 0, 0, 0, "", str(error)), "", None, None)
    run, signer = ExportedRun(export), fingerprint(export.key)
    if key is not None and key != export.key:
        problem = f"the last line: signed by {signer}, and not by the key given, {fingerprint(key)}"
        return Checked(Verdict(export.record.run, 0, 0, 0, "", problem), signer, export, None)
    # Of a journal, verifying only needs the reads.
    return Checked(verify(cast("Journal", run), export.record.run), signer, export, run)
