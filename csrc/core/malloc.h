// glibc's allocator, told to keep what is freed. By default it maps every block of 32 MiB and more afresh and hands it
// back on free, so that a training step pays a page fault and a zeroed page for each 4 KiB of each large tensor, again and
// again: that is most of what a large F.linear costs in a plain process.
#pragma once

namespace llmfast {

bool keep_freed_memory();  // for the rest of the process; false where the allocator is another

}  // namespace llmfast
