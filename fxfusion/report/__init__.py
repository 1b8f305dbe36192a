"""What fxfusion found and did, for people (tables, one HTML page) and for programs (`to_dict`)."""

from fxfusion.report.model import Block, ChainSummary, FusionReport, GraphReport, GroupSummary, MemberSummary

__all__ = ["Block", "ChainSummary", "FusionReport", "GraphReport", "GroupSummary", "MemberSummary"]
