"""sam-export models: the recipes there are."""

from __future__ import annotations

import click

from edgesam_deploy.cli.terminal import json_option, print_json, print_table


@click.command("models")
@json_option
def command(as_json: bool) -> None:
    """List the recipes: what each model is, its sizes, and where its weights come from."""
    from edgesam_deploy.recipe import available_recipes, load_recipe

    recipes = [load_recipe(name) for name in available_recipes()]
    if as_json:
        print_json(recipes)
        return
    rows = [
        (
            r.name,
            str(r.geometry.image_size),
            str(r.geometry.embedding_size),
            r.checkpoint.licence,
            r.checkpoint.url or "shipped",
            r.summary,
        )
        for r in recipes
    ]
    print_table("recipes", ("recipe", "image", "embedding", "licence", "weights", "what it is"), rows)
