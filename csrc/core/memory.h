// What memory costs before a kernel touches it. By default glibc maps every block of 32 MiB and more afresh and hands it
// back on free (smaller ones too, when the heap's end becomes free), so that large tensors pay a page fault and a zeroed
// page for each 4 KiB, at each call again: that is most of what a large F.linear or norm costs in a plain process.
#pragma once
#include <cstddef>

namespace llmfast {

constexpr size_t kLargePage = size_t{2} << 20;

// Memory that is about to be written for the first time: the whole 2 MiB pages in it are to come as such, one fault each
// instead of 512. Contents and addresses stay as they are; without such pages, or where they are switched off, nothing
// happens.
void ask_for_large_pages(void* data, size_t bytes);

bool keep_freed_memory();  // by glibc's allocator, for the rest of the process; false where the allocator is another

}  // namespace llmfast
