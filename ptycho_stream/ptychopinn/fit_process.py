"""The program that ``training.train`` runs, with the path of a request as its argument.

The model and an outcome are left beside the request. With several devices Lightning starts this
program once more for each.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from ptycho_stream.errors import PtychoStreamError
from ptycho_stream.ptychopinn.bundle import save
from ptycho_stream.ptychopinn.fit import fit
from ptycho_stream.ptychopinn.raw_data import RawData
from ptycho_stream.ptychopinn.request import OUTCOME_FILE, Outcome, read_request, write
from ptycho_stream.training.apart import end_with_parent
from ptycho_stream.training.group_fit import is_first_process
from ptycho_stream.training.peers import leave_group


def run(path: Path) -> int:
    """Do what the request at ``path`` asks for; the exit status."""
    request = read_request(path)
    config = request.training_config
    try:
        train, test = (
            RawData.from_file(file, request.measurement_domain)
            for file in (request.train_file, request.test_file)
        )
        bundle, epochs = fit(train, test, config, request.execution_config)
        leave_group()
        if is_first_process():
            save(bundle, config.output_dir)
            write(path.with_name(OUTCOME_FILE), Outcome(epochs))
    except PtychoStreamError as error:
        write(path.with_name(OUTCOME_FILE), Outcome(error=str(error)))
        return 1
    return 0


def main() -> None:
    """Be the program."""
    end_with_parent()
    logging.basicConfig(format="%(levelname)s %(message)s")
    sys.exit(run(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
