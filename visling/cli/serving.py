"""visling serve: a page in the browser to ask models about pictures and look inside."""

from __future__ import annotations

import sys
import threading
import webbrowser
from importlib import util
from pathlib import Path
from typing import Annotated

import typer

from visling.cli.options import IMAGES, Device, Offline, OtherFeatures
from visling.cli.printing import download_bar
from visling.errors import RunError

_ACCESS = "Who may ask"


def serve(
    run: Annotated[
        list[str],
        typer.Option(
            help='Run folder, model folder, a name under "Ready to answer" in `visling catalog`, or owner/name on the '
            "hub; repeat it to serve several models side by side. Of a run of several tasks each is served."
        ),
    ],
    examples: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of pictures to offer, and to search by a caption; by default the test pictures of the scenes "
            "that the first run was trained on, if they are found.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    detector: Annotated[
        Path | None,
        typer.Option(
            help="Detector folder, or its name in `visling catalog`, for all runs; by default the one in each model "
            "folder.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    other_features: OtherFeatures = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 = any that is free.")] = 8000,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. Any other than this machine's own (127.0.0.1) can be reached by others, who "
            "need the token.",
            rich_help_panel=_ACCESS,
        ),
    ] = "127.0.0.1",
    token: Annotated[
        str | None,
        typer.Option(
            help="Secret without which nothing is answered; else VISLING_TOKEN, else made and printed where others can "
            "reach the server.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Name under which a proxy on this machine offers the server; needs the token. May be repeated.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    offline: Offline = False,
    device: Device = "auto",
) -> None:
    r"""Serve models on a page in the browser, and over HTTP: choose a picture, ask, see what was looked at.

    Needs the extra `serve`: pip install 'visling\[serve]'. Only this machine is answered unless you say otherwise.

    Example: visling serve --run demo/small/visualbert/vqa --open
    """
    _check_extra()
    from visling import runtime
    from visling.serve import listen
    from visling.serve.app import create_app
    from visling.serve.examples import find_scenes, gallery_of
    from visling.serve.pictures import Pictures
    from visling.serve.runs import load_runs
    from visling.serve.service import Service
    from visling.serve.settings import ServeSettings

    private = listen.is_loopback(host) and not allow_host
    token = token or runtime.serve_token() or (None if private else listen.make_token())
    scenes = next((found for one in run if (found := find_scenes(one)) is not None), None)
    listening = listen.bind(host, port)  # before models are loaded, which takes longer
    with listening:
        defaults = ServeSettings()
        own_names = defaults.host_names if listen.is_loopback(host) else ()
        settings = ServeSettings(
            token=token,
            host_names=(*own_names, *(name.lower() for name in allow_host or ())),
            examples=examples or (None if scenes is None else gallery_of(scenes)),
        )
        pictures = Pictures(settings)
        with download_bar() as report:
            models = load_runs(
                run, pictures, detector=detector, other_features=other_features, device=device,
                offline=offline or None, report=report,
            )  # fmt: skip
        for model in models:
            if model.predictor.notice:
                print(f"note: {model.name}: {model.predictor.notice}", file=sys.stderr)
        address = listen.address_of(listening, host, token)

        def say_ready() -> None:
            print(f"Serving {', '.join(model.name for model in models)} on {address} (Ctrl-C stops)", flush=True)
            if open_:
                threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()  # some block

        service = Service(models, pictures, settings, None if examples else scenes)
        listen.serve(create_app(service), listening, say_ready)
    print("Stopped.", file=sys.stderr)


def _check_extra() -> None:
    """Refuse to start where the optional packages are missing."""
    missing = [name for name in ("fastapi", "uvicorn") if util.find_spec(name) is None]
    if missing:
        raise RunError(f"visling serve needs {' and '.join(missing)}. Install them: pip install 'visling[serve]'")
