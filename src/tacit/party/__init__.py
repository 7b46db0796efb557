"""The processes alice, bob and provider: the protocols of `tacit.mpc` over links, and prediction as a service.

Where to begin, by what you want to understand::

    who talks to whom    cluster_file  tls  dialing  streams → transport (Link: frames, both ways at once)
                         quota → channel (the same for asyncio, within what a peer may hold of the memory)
                         client_hello → entrance (one address a party)   session (one id at caller and parties)
    a run                driver (a protocol over a link)   programs, training, graphs (programs as bytes)
    randomness           tickets → dealing (the provider) → pool, vouchers (a party's disk) → refill, refilling
    models               sources → push, owning (the owner) → models, vault, keeping (the parties) → loaded
    serving              client, connection → clients → batching, queueing, limits → leading (alice), following (bob)
                         → pairing, pairs, stocking → worker.  alice, bob, provider: what runs around these, by service
    training             jobs
    on one machine       launch, process, trainer (`tacit bench`: plain TCP, no disk)   local (`tacit up`)
    for `tacit.remote`   objects

`docs/serving.md` is for who operates it, `docs/spec/session.md` and `docs/spec/tickets.md` for who checks it.
"""
