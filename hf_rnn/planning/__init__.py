"""What training takes on paper: memory, bytes exchanged and time, for a model of any size on any number of GPUs."""

from hf_rnn.planning.counting import Count, count
from hf_rnn.planning.plan import GPU, Plan, Work, make_plan, measure

__all__ = ["GPU", "Count", "Plan", "Work", "count", "make_plan", "measure"]
