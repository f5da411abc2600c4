"""A run's table as a Parquet file.

Rule of this module: step and attempt are integers, everything else float64 with its real NaN; null means that there was
nothing.
"""

from __future__ import annotations

from itertools import islice
from typing import IO, Any

from flyball.errors import FlyballError
from flyball.limits import PARQUET_ROWS
from flyball.tables import Table


def check_pyarrow() -> None:
    """Raise FlyballError, with the remedy, where pyarrow is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise FlyballError(f"pyarrow is not installed ({error}): pip install 'flyball[parquet]'") from error


def write_parquet(table: Table, file: IO[bytes]) -> None:
    """Write row groups as the rows come."""
    import pyarrow
    import pyarrow.parquet

    types = [pyarrow.int64() if name in ("step", "attempt") else pyarrow.float64() for name in table.columns]
    about = {"flyball.run": table.run, "flyball.attempt": str(table.attempt)}
    schema = pyarrow.schema(list(zip(table.columns, types, strict=True)), metadata=about)
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        while rows := list(islice(table.rows, PARQUET_ROWS)):
            columns: list[Any] = [
                pyarrow.array(column, type_) for column, type_ in zip(zip(*rows, strict=True), types, strict=True)
            ]
            writer.write_table(pyarrow.table(columns, schema=schema))
