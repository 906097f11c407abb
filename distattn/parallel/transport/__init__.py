"""How messages travel between ranks: one interface, one file a transport."""

from distattn.parallel.transport.base import Message, Parts, Pending, Transport
from distattn.parallel.transport.collective import Collective
from distattn.parallel.transport.mailbox import Mailbox, MailboxEndpoint

__all__ = ["Collective", "Mailbox", "MailboxEndpoint", "Message", "Parts", "Pending", "Transport"]
