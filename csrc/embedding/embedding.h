// embedding: out[n,C] = weight[ids[n]] (+ position_weight[position_ids[n]]), and its gradient
//   grad_weight[v,C] = sum over n with ids[n] = v of grad[n,C], in float32 and in the order of n; zero for absent ids.
//
// n stands for up to five dimensions [..., T] of ids, of any strides; without position_ids the position is the index
// along T. ids and position_ids: int32 or int64. weight and position_weight share a dtype and have contiguous rows; out
// and grad_weight are contiguous and have dtypes of their own; grad has contiguous rows.
#pragma once
#include "core/dispatch.h"
#include "core/types.h"

namespace llmfast {

struct EmbeddingParams {
  TensorView ids, weight, position_weight, position_ids, out;
};

struct EmbeddingBackwardParams {
  TensorView grad, ids, grad_weight;  // ids undefined: the index along T, that is for position_weight's gradient
  TensorView sorted_ids = {}, order = {};  // on GPUs, where ids are: their values ascending, and int64 n of each
};

void embedding_forward(const EmbeddingParams& params);
void embedding_backward(const EmbeddingBackwardParams& params);

}  // namespace llmfast

LLMFAST_DECLARE_VEC(void embedding_forward(const EmbeddingParams&))
LLMFAST_DECLARE_VEC(void embedding_backward(const EmbeddingBackwardParams&))
