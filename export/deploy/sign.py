"""``export sign`` and ``export check``: whose a bundle is, and that nobody changed it since."""

from __future__ import annotations

from pathlib import Path

import click

from detr.cli_support import emit, json_option
from engines.bundle import open_bundle
from engines.signature import SIGNATURE, TRUSTED_KEY
from engines.signature import check as check_bundle
from engines.signature import sign as sign_bundle


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--key",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Private Ed25519 key in PEM; openssl genpkey -algorithm ed25519 makes one.",
)
@json_option
def sign(bundle: Path, key: Path, as_json: bool) -> None:
    """Sign BUNDLE with everything in it: graph, golden images, engines and their evidence.

    Whatever is changed, added or taken away afterwards voids the signature, so sign last: after
    the engines were built and verified.

    Example: detr export sign student.bundle --key key.pem
    """
    opened = open_bundle(bundle, trusted=False)
    made = sign_bundle(opened.path, key)
    emit(
        made,
        as_json,
        f"{bundle / SIGNATURE}: {len(made.signed.files)} files signed with key "
        f"{made.signed.key[:16]}; who has the public key checks it with: "
        f"detr export check {bundle} --key PUBLIC",
    )


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--key",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Public Ed25519 key in PEM, had from the owner; openssl pkey -pubout makes it.",
)
@json_option
def check(bundle: Path, key: Path, as_json: bool) -> None:
    """Check that BUNDLE and every engine in it are as the owner of a key signed them.

    Exit status 3 where it is not signed, or a file was changed, added or taken away since.

    Example: detr export check student.bundle --key owner.pub
    """
    # Before anything of it is read.
    found = check_bundle(bundle, key)
    open_bundle(bundle, trusted=False)
    emit(
        found,
        as_json,
        f"{bundle}: as signed, {len(found.signed.files)} files, key {found.signed.key[:16]}; with "
        f"{TRUSTED_KEY}={key} in the environment no other bundle is opened",
    )
