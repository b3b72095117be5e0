"""`pairmill browse`."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Common, command, new_app
from curation.browse_config import BrowseConfig

app = new_app()


@command(app, "browse", BrowseConfig, example="pairmill browse DATASET --model runs/clip")
def browse(
    config: BrowseConfig,
    common: Common,
    dataset: Annotated[str, typer.Argument(help="The dataset, a folder or URL.")],
) -> int:
    """Look through a dataset in a local page: search, slide thresholds, see why, select.

    The page is for this machine only, unless --host says otherwise. Ctrl-C ends it.
    """
    from cli.web.server import listen, serve

    with common.drawer() as emit:
        with listen(config.host, config.port) as listening:
            serve(dataset, config, listening, emit, typer.echo)
    return 0
