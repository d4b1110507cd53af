"""Defines the commands about a cluster that outlives programs: `up`, `status`, `down`."""

from __future__ import annotations

from typing import Annotated

import typer

from tg_tinker.cli.shared import connector, print_table

commands = typer.Typer(rich_markup_mode="rich")

_GIB = 2**30


@commands.command()
def up(
    host: Annotated[
        str, typer.Option(help="Address by which the other machines reach this one.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1024, max=65_535, help="Port of the head.")] = 6379,
    dashboard_port: Annotated[
        int, typer.Option(min=1024, max=65_535, help="Port for `ray job submit`, local only.")
    ] = 8265,
    join: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Head to join; none is started here.")
    ] = None,
    num_cpus: Annotated[int | None, typer.Option(min=0, help="CPUs; all if left out.")] = None,
    num_gpus: Annotated[int | None, typer.Option(min=0, help="GPUs; all if left out.")] = None,
    without_tls: Annotated[
        bool, typer.Option("--without-tls", help="Allow a network on which nobody else listens.")
    ] = False,
) -> None:
    """Start a Ray cluster on this machine with TG-Tinker's settings, or join one.

    Programs, `ray job submit` and `tg-tinker serve` find the cluster. Training
    clients keep running when a program ends. Access requires the token in
    ~/.ray/auth_token. Ray sends no usage statistics.

      [cyan]tg-tinker up[/]
      [cyan]tg-tinker up --host 10.0.0.1[/]
      [cyan]tg-tinker up --join 10.0.0.1:6379 --host 10.0.0.2[/]
    """
    import os

    from rich.console import Console

    from tg_tinker.backend import serve_backend
    from tg_tinker.client.home import init_home
    from tg_tinker.cluster import node
    from tg_tinker.cluster.authentication import (
        check_token,
        make_token,
        name_token,
        token_file,
    )
    from tg_tinker.cluster.connection import WITHOUT_TLS
    from tg_tinker.errors import InvalidRequestError
    from tg_tinker.storage.home import home_directory, unusable

    home = home_directory()
    reached = [host] if join is None else [host, _host_of(join)]
    if not without_tls:
        for one in reached:
            node.check_encrypted(one)
    if join is None:
        init_home(home)
    else:
        try:
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise unusable(home, error) from None
    name_token()
    serve_backend().seal_http()
    with Console(stderr=True).status("starting Ray"), node.alone(home):
        if join is None:
            make_token()
        elif not check_token():
            raise InvalidRequestError(
                f"there is no token at {token_file()}: copy the token of the head to this path, as"
                " in docs/deployment.md"
            )
        started = node.start(
            home, host=host, port=port, dashboard_port=dashboard_port, join=join,
            num_cpus=num_cpus, num_gpus=num_gpus,
            environment={**os.environ, **({WITHOUT_TLS: "1"} if without_tls else {})},
        )  # fmt: skip
    typer.echo(f"{'Joined' if join else 'Started'} the cluster at {started.address}")
    if started.dashboard:
        typer.echo(
            # Without no_proxy, Ray would send its token to the proxy that HTTP_PROXY names.
            "Programs of this user find it. To run a job:\n  no_proxy=127.0.0.1"
            " RAY_AUTH_MODE=token ray job submit"
            f" --address {started.dashboard} -- python train.py"
        )


@commands.command()
def status(ctx: typer.Context) -> None:
    """Show the cluster that runs here: machines, free CPUs and GPUs, training clients.

    The exit status is 1 if no cluster runs here.

      [cyan]tg-tinker status[/]
    """
    _need_a_cluster()
    with connector(ctx)() as service:
        found = service.cluster_status()
        steps = {run.training_client_id: run for run in service.list_training_clients()}
    kind = "under TLS" if found.encrypted else "without TLS"
    typer.echo(f"cluster at {found.address}, {kind}")
    rows = [
        (address, f"{has.get('CPU', 0):g}", f"{has.get('GPU', 0):g}",
         f"{has.get('memory', 0) / _GIB:.1f} GiB")
        for address, has in found.machines.items()
    ]  # fmt: skip
    print_table(("machine", "CPUs", "GPUs", "memory"), rows)
    typer.echo(f"free: {found.free.get('CPU', 0):g} CPUs, {found.free.get('GPU', 0):g} GPUs")
    for run in found.clients:  # for runs of other tenants only the id is known
        known = steps.get(run)
        typer.echo(f"trains: {run}" + (f", {known.status}, step {known.step}" if known else ""))
    if not found.clients:
        typer.echo("trains: nobody")


@commands.command()
def down(
    ctx: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Stop the cluster that `tg-tinker up` started here; other clusters keep running.

    Its training clients end, and their steps since the last save_state are
    lost. Runs, artifacts, budgets and keys are on disk and stay.

      [cyan]tg-tinker down[/]
      [cyan]tg-tinker down --yes[/]
    """
    from tg_tinker.cluster import node
    from tg_tinker.errors import ClusterUnavailableError
    from tg_tinker.storage.home import home_directory

    running = node.read(home_directory())
    if running is None:
        raise ClusterUnavailableError(
            "no cluster that `tg-tinker up` started from this home runs here: end a cluster of"
            " `ray start` with `ray stop`"
        )
    if not yes and running.dashboard and (trains := _training(ctx, running.address)):
        typer.confirm(f"End {trains} and lose what was not saved?", abort=True)
    node.stop(home_directory())
    what = "the cluster" if running.dashboard else "this machine's part of the cluster"
    typer.echo(f"Ended {what} at {running.address}")


def _training(ctx: typer.Context, address: str) -> str:
    """Returns what trains on a cluster, in words; empty if nothing does."""
    from tg_tinker.cluster.connection import fitting_cluster
    from tg_tinker.errors import TGTinkerError

    unseen = "the cluster with all its training clients"
    if fitting_cluster() != address:  # as after an upgrade of Ray
        return unseen
    try:
        with connector(ctx)() as service:
            clients = service.cluster_status().clients
    except TGTinkerError:  # as after an upgrade of TG-Tinker: what cannot be seen can be ended
        return unseen
    return f"{len(clients)} training clients" if len(clients) > 1 else "".join(clients)


def _host_of(join: str) -> str:
    from tg_tinker.errors import InvalidRequestError

    host, _, port = join.rpartition(":")
    if not host or not port.isdecimal():
        raise InvalidRequestError(f"--join {join!r} is not HOST:PORT: pass one like 10.0.0.1:6379")
    return host.strip("[]")


def _need_a_cluster() -> None:
    import os

    from tg_tinker.cluster.connection import fitting_cluster
    from tg_tinker.errors import ClusterUnavailableError

    if not os.environ.get("RAY_ADDRESS") and fitting_cluster() is None:
        raise ClusterUnavailableError(
            "no cluster that this program can use runs here: start one with `tg-tinker up`"
        )
