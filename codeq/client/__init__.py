"""What users import: Producer and Worker, over the two streams."""

from codeq.client.producer import NewTask, Producer
from codeq.client.task import Fail, Nack, Task
from codeq.client.tls import Tls
from codeq.client.worker import Worker

__all__ = ["Fail", "Nack", "NewTask", "Producer", "Task", "Tls", "Worker"]
