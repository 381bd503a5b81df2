"""``ptycho-stream ctl …``: ask and command a running daemon over its control socket."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ptycho_stream.cli import ctl_images, ctl_training
from ptycho_stream.cli.key_options import give_keys
from ptycho_stream.cli.options import (
    AsJson,
    Config,
    ControlEndpoint,
    Timeout,
    call_daemon,
    print_result,
    print_scans,
)

app = typer.Typer(
    help="Ask and command a running daemon.\n\nExample: ptycho-stream ctl status --json",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(ctl_training.app)
app.add_typer(ctl_images.app)

ScanId = Annotated[
    str | None, typer.Argument(metavar="[ID]", help="The scan; without it the newest or running.")
]


@app.command()
def status(
    config: Config = None,
    endpoint: ControlEndpoint = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Say how the daemon and its stages are.

    Example: ptycho-stream ctl status
    """
    print_result(call_daemon("status", {}, config, endpoint, timeout), as_json)


@app.command()
def scans(
    config: Config = None,
    endpoint: ControlEndpoint = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 20,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """List the scans in the store.

    Example: ptycho-stream ctl scans --limit 5
    """
    found = call_daemon("scans", {"limit": limit}, config, endpoint, timeout)
    if as_json:
        typer.echo(json.dumps(found))
        return
    print_scans(found)


@app.command()
def scan(
    scan_id: ScanId = None,
    config: Config = None,
    endpoint: ControlEndpoint = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Say all that is known of a scan.

    Example: ptycho-stream ctl scan 01JBQ3N8Z5T0V6W7X8Y9ZABCDE
    """
    print_result(call_daemon("scan", {"scan_id": scan_id}, config, endpoint, timeout), as_json)


@app.command()
def start(
    config: Config = None,
    endpoint: ControlEndpoint = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option("--meta", metavar="KEY=VALUE", help="Goes into every result; repeatable."),
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="How many frames to expect.")] = None,
    series: Annotated[str | None, typer.Option(help="The detector's series, if known.")] = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Arm a scan before the detector begins.

    Example: ptycho-stream ctl start --meta sample=star --meta operator=Kim
    """
    words = dict(_pair(item) for item in metadata or [])
    arguments = {"metadata": words, "expected_frames": frames, "series": series}
    print_result(call_daemon("start", arguments, config, endpoint, timeout), as_json)


def _pair(item: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not key or not equals:
        raise typer.BadParameter(f"--meta {item}: write KEY=VALUE")
    return key, value


@app.command()
def stop(
    scan_id: ScanId = None,
    config: Config = None,
    endpoint: ControlEndpoint = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """End the running scan as if its detector had.

    Example: ptycho-stream ctl stop
    """
    print_result(call_daemon("stop", {"scan_id": scan_id}, config, endpoint, timeout), as_json)


@app.command()
def abort(
    scan_id: ScanId = None,
    config: Config = None,
    endpoint: ControlEndpoint = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Give the running scan up; what it has stored stays.

    Example: ptycho-stream ctl abort
    """
    print_result(call_daemon("abort", {"scan_id": scan_id}, config, endpoint, timeout), as_json)


@app.command()
def export(
    scan_id: ScanId = None,
    config: Config = None,
    endpoint: ControlEndpoint = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format", help="npz, png, tiff, ptychodus, cxi or ptychopinn; repeatable. [npz]"
        ),
    ] = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Make the daemon write a scan's image into its export folder.

    With ptychodus, cxi and ptychopinn its frames are written too.

    Example: ptycho-stream ctl export --format npz --format ptychodus
    """
    arguments = {"scan_id": scan_id, "formats": formats or ["npz"]}
    print_result(call_daemon("export", arguments, config, endpoint, timeout), as_json)


@app.command()
def reload(
    config: Config = None,
    endpoint: ControlEndpoint = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Make the daemon read its settings again.

    Example: ptycho-stream ctl reload
    """
    print_result(call_daemon("reload", {}, config, endpoint, timeout), as_json)


@app.command()
def endpoints(
    config: Config = None,
    endpoint: ControlEndpoint = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Say what the daemon knows of the sockets it listens to.

    Example: ptycho-stream ctl endpoints
    """
    print_result(call_daemon("endpoints", {}, config, endpoint, timeout), as_json)


give_keys(app)
