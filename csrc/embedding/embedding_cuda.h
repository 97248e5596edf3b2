// embedding on a GPU: the kernels' entry points. Ids out of range, which only the device could find, give rows of NaN
// and no gradient. At most 2^31 - 1 ids, rows and columns.
#pragma once
#include "core/cuda_dispatch.h"
#include "embedding/embedding.h"

namespace llmfast {

void embedding_forward(const EmbeddingParams& params, const Stream& stream);
void embedding_backward(const EmbeddingBackwardParams& params, const Stream& stream);

namespace cuda {
void embedding_forward_sm80(const EmbeddingParams& params, const Stream& stream);
void embedding_backward_sm80(const EmbeddingBackwardParams& params, const Stream& stream);
}  // namespace cuda

}  // namespace llmfast
