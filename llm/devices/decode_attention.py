"""Attention of a decode step in float32, for an x86 processor: one query of each row and head.

One thread computes a query's scores, their softmax and the weighted sum of the values, key after key. The bits depend
on no other row, on no number of threads, and not on how far the cache reaches beyond the keys that the row sees.
"""

import functools
import math

import torch
from llvmlite import ir
from torch import Tensor

from llm.devices import jit
from llm.devices.jit import FLOAT, I64, POINTER, at, loop, part


def fits(query: Tensor) -> bool:
    """Whether the kernel computes the attention of a query: of one token, in float32, with a head of whole vectors."""
    return query.dtype == torch.float32 and query.shape[-2] == 1 and query.shape[-1] % jit.lanes() == 0


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """query (rows, heads, 1, head size), key and value (rows, key heads, length, head size), a head's keys one after
    another; mask, additive, (rows or 1, heads or 1, 1, length). Returns query's shape."""
    rows, heads, _, size = query.shape
    key_heads, length = key.shape[1:3]
    together = queries_together(heads // key_heads, size, jit.lanes())
    padded = -(-length // jit.lanes()) * jit.lanes()
    threads = torch.get_num_threads()
    query, mask = query.contiguous(), mask.expand(rows, heads, 1, length)
    key, value = (x if x.stride()[2:] == (size, 1) else x.contiguous() for x in (key, value))
    result, scores = torch.empty_like(query), query.new_empty(threads * together * padded)
    compiled(size, together, jit.lanes())(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        mask.data_ptr(),
        result.data_ptr(),
        scores.data_ptr(),
        rows * heads // together,
        heads,
        heads // key_heads,
        length,
        heads * size,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        mask.stride(0),
        mask.stride(1),
        scale,
        threads,
    )
    return result


@functools.cache
def queries_together(group: int, size: int, lanes: int) -> int:
    """How many queries of a group that reads the same keys one task computes: as many as the registers hold."""
    most = max(1, (16 if lanes == 16 else 8) // (size // lanes))
    return next(number for number in range(min(group, most), 0, -1) if group % number == 0)


@functools.cache
def compiled(size: int, together: int, lanes: int) -> jit.Kernel:
    """The attention of heads of a size, so many queries in a task, for vectors of so many values."""
    return _Code(size, together, lanes).compiled()


class _Code(jit.Code):
    def __init__(self, size: int, together: int, lanes: int):
        super().__init__(lanes)
        self.size = size
        self.together = together
        self.parallel([POINTER] * 6 + [I64] * 11 + [FLOAT], self._task)

    def _task(
        self,
        b: ir.IRBuilder,
        number: ir.Value,
        threads: ir.Value,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        mask: ir.Value,
        result: ir.Value,
        scores: ir.Value,
        tasks: ir.Value,
        heads: ir.Value,
        group: ir.Value,
        length: ir.Value,
        query_row: ir.Value,
        key_row: ir.Value,
        key_head: ir.Value,
        value_row: ir.Value,
        value_head: ir.Value,
        mask_row: ir.Value,
        mask_head: ir.Value,
        scale: ir.Value,
    ) -> None:
        vectors = b.sdiv(b.add(length, I64(self.lanes - 1)), I64(self.lanes))
        padded = b.mul(vectors, I64(self.lanes))
        scores = at(b, scores, b.mul(number, b.mul(padded, I64(self.together))))
        of_query = [at(b, scores, b.mul(padded, I64(i))) for i in range(self.together)]
        with loop(b, *part(b, tasks, threads, number)) as (task, _):
            first = b.mul(task, I64(self.together))
            row, head = b.sdiv(first, heads), b.srem(first, heads)
            key_number = b.sdiv(head, group)
            masks = [
                at(b, mask, b.add(b.mul(row, mask_row), b.mul(b.add(head, I64(i)), mask_head)))
                for i in range(self.together)
            ]
            end = self._end(b, masks, length)
            start = b.mul(first, I64(self.size))
            place = b.add(b.mul(row, key_row), b.mul(key_number, key_head))
            queries = at(b, query, b.add(b.mul(row, query_row), b.mul(head, I64(self.size))))
            self._score(b, queries, at(b, key, place), masks, of_query, end, scale)
            sums = [self._weigh(b, of_one, end) for of_one in of_query]
            place = b.add(b.mul(row, value_row), b.mul(key_number, value_head))
            self._sum(b, at(b, value, place), of_query, sums, at(b, result, start), end)

    def _end(self, b: ir.IRBuilder, masks: list[ir.Value], length: ir.Value) -> ir.Value:
        """Of one of these rows of the mask at least, the position after the last one that it does not hide."""
        with loop(b, I64(0), length, [I64(1)]) as (position, ends):
            for mask in masks:
                sees = b.fcmp_unordered("!=", b.load(at(b, mask, position), typ=FLOAT), ir.Constant(FLOAT, -math.inf))
                ends[0] = b.select(sees, b.add(position, I64(1)), ends[0])
        return ends[0]

    def _score(
        self,
        b: ir.IRBuilder,
        query: ir.Value,
        key: ir.Value,
        masks: list[ir.Value],
        scores: list[ir.Value],
        end: ir.Value,
        scale: ir.Value,
    ) -> None:
        parts = range(self.size // self.lanes)
        queries = [[self.load(b, query, i * self.size + p * self.lanes) for p in parts] for i in range(self.together)]
        with loop(b, I64(0), end) as (position, _):
            of_position = at(b, key, b.mul(position, I64(self.size)))
            keys = [self.load(b, of_position, p * self.lanes) for p in parts]
            for of_query, mask, target in zip(queries, masks, scores, strict=True):
                products = b.fmul(of_query[0], keys[0])
                for x, y in zip(of_query[1:], keys[1:], strict=True):
                    products = self.multiply_add(b, x, y, products)
                score = self.reduced(b, "fadd", products)
                score = self.multiply_add(b, score, scale, b.load(at(b, mask, position), typ=FLOAT))
                b.store(score, at(b, target, position))

    def _weigh(self, b: ir.IRBuilder, scores: ir.Value, end: ir.Value) -> ir.Value:
        """Put exp(score - the largest score) in place of the scores. Returns their sum."""
        vectors = b.sdiv(b.add(end, I64(self.lanes - 1)), I64(self.lanes))
        # the last vector's rest
        with loop(b, end, b.mul(vectors, I64(self.lanes))) as (position, _):
            b.store(ir.Constant(FLOAT, -math.inf), at(b, scores, position))
        with loop(b, I64(0), vectors, [self.constant(-math.inf)]) as (index, largest):
            score = self.load(b, scores, b.mul(index, I64(self.lanes)))
            largest[0] = b.select(b.fcmp_ordered(">", score, largest[0]), score, largest[0])
        most = self.repeated(b, self.reduced(b, "fmax", largest[0]))
        with loop(b, I64(0), vectors, [self.constant(0)]) as (index, sums):
            place = at(b, scores, b.mul(index, I64(self.lanes)))
            weight = self.exp(b, b.fsub(self.load(b, place), most))
            b.store(weight, place, align=4)
            sums[0] = b.fadd(sums[0], weight)
        return self.reduced(b, "fadd", sums[0])

    def _sum(
        self,
        b: ir.IRBuilder,
        value: ir.Value,
        weights: list[ir.Value],
        sums: list[ir.Value],
        result: ir.Value,
        end: ir.Value,
    ) -> None:
        parts = self.size // self.lanes
        with loop(b, I64(0), end, [self.constant(0)] * (parts * self.together)) as (position, totals):
            of_position = at(b, value, b.mul(position, I64(self.size)))
            values = [self.load(b, of_position, p * self.lanes) for p in range(parts)]
            for i, of_query in enumerate(weights):
                weight = self.repeated(b, b.load(at(b, of_query, position), typ=FLOAT))
                for p in range(parts):
                    place = i * parts + p
                    totals[place] = self.multiply_add(b, weight, values[p], totals[place])
        for i, of_query in enumerate(sums):
            divisor = self.repeated(b, of_query)
            for p in range(parts):
                place = at(b, result, i * self.size + p * self.lanes)
                b.store(b.fdiv(totals[i * parts + p], divisor), place, align=4)
