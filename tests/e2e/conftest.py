from collections.abc import Iterator

import msgspec
import pytest

from serving import cluster_of, prepared, pushed
from tacit.identity import Identity, key_text
from tacit.party import cluster_file
from tacit.party.local import CLUSTER, LocalService


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    """A service with the model ``small`` of ``owner``; two clients, another owner, and a client that may not ask it.

    Tests leave it as they found it.
    """
    folder = tmp_path_factory.mktemp("service")
    cluster = cluster_of(folder, ("clinic", "lab", "outsider"))
    Identity.fresh().save(folder / "rival.key")
    owners = {**cluster.owners, "rival": cluster_file.Owner(key=key_text(Identity.load(folder / "rival.key").public))}
    outsider = msgspec.structs.replace(cluster.clients["outsider"], models=("other",))
    changed = msgspec.structs.replace(cluster, owners=owners, clients={**cluster.clients, "outsider": outsider})
    (folder / CLUSTER).unlink()
    cluster_file.write(changed, folder / CLUSTER)
    with LocalService(folder) as service:
        ready = prepared(service.key("owner"))  # while the three start
        service.wait_ready()
        pushed(service, ready=ready)
        yield service
