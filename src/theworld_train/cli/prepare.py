"""`theworld-train prepare`: fetch the images that rows name by URL, and write conversations that hold them."""

from __future__ import annotations

from typing import Annotated

import typer


def prepare(
    rows: Annotated[
        str, typer.Argument(metavar="ROWS", help="Rows: JSON, JSONL, TSV, Parquet, or a directory of Parquet files.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The directory to write, or to go on with.")],
    form: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="What a row is: captions or conversations.")
    ] = "captions",
    image_key: Annotated[str, typer.Option(metavar="KEY", help="Field of a row with the URL.")] = "url",
    text_key: Annotated[str, typer.Option(metavar="KEY", help="Field of a row with the caption.")] = "caption",
    question: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="What the user asks for a caption; several are taken in turn."),
    ] = None,
    unique_images: Annotated[
        bool, typer.Option("--unique-images", help="Leave out a row whose images an earlier row has, whatever it says.")
    ] = False,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Bytes of images after which a new file begins.")] = 2**30,
    connections: Annotated[int, typer.Option(min=1, max=256, help="Downloads at once.")] = 16,
    max_file_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of an image.")] = 20 * 2**20,
    max_total_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of all downloads.")] = 100 * 2**30,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Most seconds that an image may take.")] = 30.0,
    port: Annotated[
        list[int] | None, typer.Option(min=1, max=65535, help="Port that may be connected to; 443 if not given.")
    ] = None,
) -> None:
    """Fetch the images that rows name by URL, and write Parquet files of conversations that training reads.

    OUT gets rows-00000.parquet and so on, for source: parquet, path: OUT; failed.jsonl, with the rows whose images
    cannot be had and why; and report.json. Only https URLs on public addresses are fetched, and redirects are checked
    alike. Run it again after it was stopped: it goes on where it was.

    Example:
        theworld-train prepare cc3m/Train_GCC-training.tsv cc3m/prepared --unique-images
    """
    from theworld_train.preparation import Downloader, Limits, Settings
    from theworld_train.preparation import prepare as run

    settings = Settings(
        rows=rows,
        out=out,
        format=form,
        image_key=image_key,
        text_key=text_key,
        questions=tuple(question) if question else ("Describe the image.",),
        unique_images=unique_images,
        shard_bytes=shard_bytes,
        connections=connections,
        max_total_bytes=max_total_bytes,
        limits=Limits(max_file_bytes, max_seconds, tuple(port) if port else (443,)),
    )
    typer.echo(str(run(settings, Downloader(settings.limits), typer.echo)))
