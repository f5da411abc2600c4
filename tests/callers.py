"""Who asks, in tests that are about something else."""

from flyball_server.auth.access import Caller


def caller(actor: str) -> Caller:
    """Somebody of this name who may do everything."""
    return Caller(actor, "admin")


ANYBODY = caller("a")


class Open:
    """A door that everybody comes in by, as ANYBODY."""

    async def admit(self, peer, authorization):
        return ANYBODY

    admit_again = admit

    def denied(self, caller, peer, why):
        """Nothing is put on record."""
