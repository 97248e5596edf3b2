// Which keys matter to which query rows.
//
// The unit of work is a head group: one sequence and one kv head. All its `rows` = Tq * group queries attend to the
// same Tk keys. Row r is query r / group of query head kv_head * group + r % group, so that rows next to each other see
// almost the same keys, and few queries with many heads fill the lanes as well as many queries with one head.
#pragma once
#include "attention/attention.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

struct KeyRange {
  int64_t begin, end;

  bool empty() const { return begin >= end; }
  int64_t count() const { return end - begin; }
};

inline KeyRange intersect(KeyRange a, KeyRange b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}
inline bool contains(KeyRange outer, KeyRange inner) { return outer.begin <= inner.begin && inner.end <= outer.end; }

struct HeadGroup {
  const AttentionParams& params;
  int64_t sequence, kv_head;
  int64_t first_q, first_k;  // tokens before this sequence
  int64_t Tq, Tk, group, rows;

  HeadGroup(const AttentionParams& p, int64_t sequence, int64_t kv_head)
      : params(p),
        sequence(sequence),
        kv_head(kv_head),
        first_q(p.first_q ? p.first_q[sequence] : 0),
        first_k(p.first_k ? p.first_k[sequence] : 0),
        Tq(p.first_q ? p.first_q[sequence + 1] - first_q : p.Tq),
        Tk(p.first_k ? p.first_k[sequence + 1] - first_k : p.Tk),
        group(p.Hq / p.Hkv),
        rows(Tq * group) {}

  int64_t query_of(int64_t row) const { return row / group; }
  int64_t head_of(int64_t row) const { return kv_head * group + row % group; }

  // The first element of a query row of q, out, grad_out, grad_q or lse.
  template <class T>
  T* row(const HeadTensor& t, int64_t row) const {
    return static_cast<T*>(t.data) + sequence * t.sequence_stride + head_of(row) * t.head_stride +
           (first_q + query_of(row)) * t.token_stride;
  }
  // The first element of a key's row of k, v, grad_k or grad_v.
  template <class T>
  T* key_row(const HeadTensor& t, int64_t key) const {
    return static_cast<T*>(t.data) + sequence * t.sequence_stride + kv_head * t.head_stride +
           (first_k + key) * t.token_stride;
  }

  // Keys inside the band for one query, or row. Both bounds grow with the row.
  KeyRange keys_of_query(int64_t query) const {
    const int64_t diagonal = query + Tk - Tq;
    return intersect({diagonal - params.left, diagonal + params.right + 1}, {0, Tk});
  }
  KeyRange keys_of(int64_t row) const { return keys_of_query(query_of(row)); }
  // Keys that some, or all, of the rows [first, last] have in their band.
  KeyRange keys_of_any(int64_t first, int64_t last) const { return {keys_of(first).begin, keys_of(last).end}; }
  KeyRange keys_of_all(int64_t first, int64_t last) const { return {keys_of(last).begin, keys_of(first).end}; }
};

}  // namespace
}  // namespace llmfast::LLMFAST_TARGET
