#include "core/malloc.h"

#include <climits>
#include <cstdlib>  // defines __GLIBC__

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace llmfast {

bool keep_freed_memory() {
#ifdef __GLIBC__
  // M_MMAP_MAX 0: all blocks come from the heap; the other two let it grow in large steps and never shrink.
  return mallopt(M_MMAP_MAX, 0) && mallopt(M_TRIM_THRESHOLD, INT_MAX) && mallopt(M_TOP_PAD, 64 << 20);
#else
  return false;
#endif
}

}  // namespace llmfast
