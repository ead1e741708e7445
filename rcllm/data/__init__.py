"""Catalogues, interaction logs and made requests: what users bring, read from files.

Knows nothing of prompts, models or caches, and never imports torch. Invariant: no row is dropped in silence; every
reader returns a ReadReport, or raises DataError that names file and line.
"""

from rcllm.data.catalogue import Catalogue
from rcllm.data.dataset import Dataset
from rcllm.data.files import Problem, Table
from rcllm.data.formats import FORMATS, detect_format, load_dataset
from rcllm.data.interactions import InteractionColumns, histories, read_interactions, read_users
from rcllm.data.movielens import fetch_movielens
from rcllm.data.negatives import Negatives
from rcllm.data.requests import Split, build_requests, named_items, split_of
from rcllm.data.rows import BadRowError, ReadReport, RowReader

__all__ = [
    "FORMATS",
    "BadRowError",
    "Catalogue",
    "Dataset",
    "InteractionColumns",
    "Negatives",
    "Problem",
    "ReadReport",
    "RowReader",
    "Split",
    "Table",
    "build_requests",
    "detect_format",
    "fetch_movielens",
    "histories",
    "load_dataset",
    "named_items",
    "read_interactions",
    "read_users",
    "split_of",
]
