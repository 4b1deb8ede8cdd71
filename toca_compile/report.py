"""stub for now"""
from typing import Any
Report = Any
def make_report(session: Any) -> Any: return session
