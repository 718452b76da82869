"""Commands that look at recipes and data, train and label.

Whatever takes long to import is imported inside the functions.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from training import options
from training.command import parse_changes, parse_size

IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000

app = typer.Typer()
console = Console(highlight=False)


def say(text: str) -> None:
    """Print a sentence as it is, on as few lines as the terminal makes of it."""
    console.print(text, soft_wrap=True, markup=False)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="One of them, in full.")
    ] = None,
    change: options.Change = None,
    data: options.Data = None,
    data_dir: options.DataDir = None,
    checkpoint: options.Checkpoint = None,
    image_size: options.Size = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="How each group of variables is trained.")
    ] = False,
    classes: Annotated[
        int | None,
        typer.Option(min=1, help="With --explain.", show_default="the data's, or 1000"),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="PNG file of the learning rate over the epochs.")
    ] = None,
) -> None:
    """List the recipes, or say all that one of them says, changed or not."""
    from training.recipes import find_recipe

    if name is None:
        given = (change, data, data_dir, checkpoint, image_size, classes, picture)
        if explain or any(x is not None for x in given):
            raise ValueError("Options are for one recipe: keras-vit recipes RECIPE ...")
        _print_overview()
        return
    recipe = find_recipe(name)
    chosen = _changed(recipe, change, data, checkpoint, image_size)
    if picture is not None:
        check_png(picture)
    _print_recipe(chosen, recipe)
    if explain:
        _print_groups(chosen, classes, data_dir)
    if picture is not None:
        from training.recipe_picture import draw_learning_rate

        images = _images(chosen, data_dir)
        draw_learning_rate(chosen, images, picture)
        say(f"Picture: {picture}, for {images:,} training images.")
    if not explain and picture is None:
        say(f"Next: keras-vit recipes {name} --explain")


def _changed(recipe, change, data, checkpoint, image_size):
    """The recipe with what the command line says of it."""
    given = {"data": data, "checkpoint": checkpoint}
    changes = {name: x for name, x in given.items() if x is not None}
    return recipe.replace(**(changes | parse_changes(change or [], image_size)))


def check_png(path: Path) -> None:
    """Refuse a picture of another kind."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"A picture must end in .png, got {str(path)!r}.")


def _print_overview():
    from training.recipe_tables import overview

    table = Table(show_lines=True)
    table.add_column("recipe", no_wrap=True)
    table.add_column("model, data", no_wrap=True)
    table.add_column("cost, result")
    for name, model, data, cost, result in overview():
        table.add_row(name, Text(f"{model}\n{data}"), Text(f"{cost}\n{result}"))
    console.print(table)
    say("Next: keras-vit recipes digits")


def _print_recipe(recipe, before):
    from training.recipe_tables import sections

    of = "" if recipe == before else ", unchanged"
    for title in ("source", "cost", "expected"):
        line = f"{title.capitalize()}{of}: {getattr(recipe, title)}"
        console.print(line, markup=False)
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for title, rows in sections(recipe, before).items():
        table.add_section()
        table.add_row(Text(title, style="bold"), "")
        for name, text in rows:
            table.add_row(Text(f"  {name}"), Text(text))
    console.print(table)


def _print_groups(recipe, classes, data_dir):
    from training.convert import model_builder
    from training.recipe_tables import explained

    images = _local(recipe, data_dir)
    count = len(images.labels) if images is not None else IMAGENET_CLASSES
    names = [str(i) for i in range(classes or count)]
    model = model_builder(recipe, names, say)()
    rows = explained(model, recipe)
    table = Table(title=f"{model.name}, {len(names)} classes", title_justify="left")
    titles = ("trained alike", "variables", "parameters", "factor", "peak", "decay")
    for i, title in enumerate(titles):
        table.add_column(title, justify="right" if i > 1 else "left")
    for part, variables, count, *how in rows:
        table.add_row(*(Text(x) for x in (part, variables, f"{count:,}", *how)))
    console.print(table)
    trained = sum(row[2] for row in rows if row[3] != "frozen")
    say(f"Trained: {trained:,} of {sum(row[2] for row in rows):,} parameters.")


def _local(recipe, data_dir):
    """The data of a recipe, where they are at hand."""
    import training

    if recipe.data is None or (recipe.data.startswith("tfds:") and data_dir is None):
        return None
    return training.load_data(recipe.data, data_dir)


def _images(recipe, data_dir):
    images = _local(recipe, data_dir)
    count = IMAGENET_IMAGES if images is None else images.sizes["train"]
    return min(count, recipe.train_images or count)


@app.command("show-data")
def show_data(
    recipe: options.RecipeName,
    out: Annotated[Path, typer.Argument(help="A PNG file.")],
    data: options.Data = None,
    data_dir: options.DataDir = None,
    change: options.Change = None,
    labels: options.LabelMaps = None,
    checkpoint: options.Checkpoint = None,
    image_size: options.Size = None,
) -> None:
    """Draw training images as the model sees them: plain and augmented."""
    from training.recipes import find_recipe

    chosen = _changed(find_recipe(recipe), change, data, checkpoint, image_size)
    chosen.replace(teaching=None).check_complete()
    check_png(out)

    from training import task
    from training.contact_sheet import draw_training
    from training.convert import model_builder

    images = _with_labels(chosen, labels, data_dir)
    model = model_builder(chosen, images.labels, say)()
    preprocess = task.preprocess_for(model, images)
    grid = task.token_grid(model, preprocess, chosen)
    draw_training(
        images, preprocess, chosen.augmentation, out, seed=chosen.seed, token_grid=grid
    )
    say(f"Picture: {out}, images of {images.name}, plain on the left.")
    same = ", with the same options" if chosen != find_recipe(recipe) or labels else ""
    say(f"Next: keras-vit train {recipe}{same}")


@app.command()
def train(
    recipe: options.RecipeName,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Where the run is kept.", show_default="runs/RECIPE"),
    ] = None,
    data: options.Data = None,
    data_dir: options.DataDir = None,
    change: options.Change = None,
    labels: options.LabelMaps = None,
    checkpoint: options.Checkpoint = None,
    image_size: options.Size = None,
    devices: Annotated[
        str | None,
        typer.Option(
            help="all, a number, or DATAxMODEL such as 4x2, on JAX.",
            show_default="one",
        ),
    ] = None,
    data_service: Annotated[
        str | None,
        typer.Option(
            metavar="grpc://HOST:PORT",
            help="A tf.data service whose workers make the batches.",
            show_default="made here",
        ),
    ] = None,
) -> None:
    """Train by a recipe; run the same command again to resume.

    With --from the model is that of the checkpoint; of the recipe's model nothing is
    left, only what --set and --image-size say is changed.
    """
    from training.recipes import find_recipe

    chosen = _changed(find_recipe(recipe), change, data, checkpoint, image_size)
    chosen.check_complete()
    run_dir = run_dir or Path("runs") / recipe

    import training
    from training.convert import model_builder
    from training.distribution import is_chief, parse_devices
    from training.runs import summary

    placed = parse_devices(devices)
    images = _with_labels(chosen, labels, data_dir)
    build = model_builder(chosen, images.labels, say)
    model = training.fit(
        build, images, chosen, run_dir, devices=placed, data_service=data_service
    )
    if not is_chief():
        return
    following = f"keras-vit export {run_dir} models/{recipe}"
    if images.masks:
        following = f"keras-vit evaluate {run_dir} --data {chosen.data} --picture x.png"
    say(f"{model.name}: {summary(run_dir)}. Run kept in {run_dir}")
    say(f"Next: {following}")


def _with_labels(recipe, labels, data_dir):
    """The data of a recipe, with label maps where some are given."""
    import training

    images = training.load_data(recipe.data, data_dir)
    if labels is None:
        return images
    if recipe.token_labeling is None:
        raise ValueError(
            f"--labels is for recipes that label tokens, {recipe.name!r} labels none; "
            "add --set 'token_labeling={}' to label them."
        )
    return training.with_label_maps(images, labels)


@app.command()
def annotate(
    teacher: Annotated[Path, typer.Option(help="Classifier: a .keras file or a run.")],
    data: Annotated[str, typer.Option(help=options.DATA)],
    out: Annotated[Path, typer.Option(help="Folder for the label maps.")],
    data_dir: options.DataDir = None,
    top: Annotated[
        int | None,
        typer.Option(help="Classes a place.", show_default="5, or all of at most 16"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 32,
    shard_size: Annotated[int, typer.Option(help="Images a file.")] = 512,
    image_size: options.AnySize = None,
    normalization: Annotated[
        str | None,
        typer.Option(
            help="inception, imagenet or clip.", show_default="the teacher does it"
        ),
    ] = None,
    runner: Annotated[
        str | None, typer.Option(help="An Apache Beam runner, as DirectRunner.")
    ] = None,
) -> None:
    """Score maps of training images by a teacher; run it again to resume."""
    import training
    from training.files import model_file

    path, names = model_file(teacher)
    size = None if image_size is None else parse_size(image_size)
    images = training.load_data(data, data_dir)
    if names not in (None, list(images.labels)):
        raise ValueError(
            f"The run {teacher} must have the labels of {data}, it has "
            f"{', '.join(names[:10])}."
        )
    store = training.annotate(
        path,
        images,
        out,
        top=top,
        batch_size=batch_size,
        shard_size=shard_size,
        normalization=normalization,
        image_size=size,
        runner=runner,
    )
    say(f"{out}: {store.summary()}")
    say(f"Next: keras-vit train ... --labels {out}")


@app.command()
def labels(
    directory: Annotated[Path, typer.Argument(help="Folder of label maps.")],
) -> None:
    """Check the label maps that `annotate` made, every byte of them."""
    import training

    store = training.open_labels(directory)
    store.check()
    say(f"{directory}: {store.summary()}. OK")
